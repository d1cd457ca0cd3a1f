"""Models of other libraries: moe-import reads them, moe-export writes them.

A module of this room that has a family registers it; they are imported here.
"""

from moe_train.conversion import m2m100 as m2m100
from moe_train.conversion import nllb_moe as nllb_moe
