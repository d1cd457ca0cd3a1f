"""Our models on fairseq's command line: ``--arch moe_transformer --moe-config 'model=tiny routing=switch'``.

No ``from __future__ import annotations`` here: fairseq builds its parsers from annotations that are types, not strings.
"""

import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from moe_train.config import ModelConfig, build
from moe_train.config.paths import configs_directory
from moe_train.errors import ConfigError
from moe_train.fairseq_compat import apply

apply()
from fairseq.dataclass import FairseqDataclass  # noqa: E402
from fairseq.models import BaseFairseqModel, register_model  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from hydra.errors import HydraException  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

ARCH = "moe_transformer"
_DEFAULTS = {"model": "tiny", "routing": "switch"}


@dataclass
class MoEModelFlags(FairseqDataclass):  # type: ignore[misc]
    """The flag ``--moe-config``: overrides of groups and keys in the grammar of ``moe-train``."""

    moe_config: str = field(
        default="model=tiny routing=switch",
        metadata={"help": "overrides of model and routing as for moe-train, e.g. 'model=base routing=switch'"},
    )


@register_model(ARCH, dataclass=MoEModelFlags)
class MoETransformerArch(BaseFairseqModel):  # type: ignore[misc]
    """Entry in fairseq's registry, which builds the model of :func:`moe_train.models.build_model`."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> Any:
        """Calls the task to build the model, since the task knows seed and data."""
        model, routing = composed(cfg.moe_config)
        return task.build_configured(model, routing)


def composed(overrides: str) -> tuple[ModelConfig, dict[str, Any]]:
    """The groups ``model`` and ``routing``, composed from the shipped configs in the grammar of ``moe-train``.

    Raises:
        ConfigError: an override of another group, an unknown name, or an invalid value.
    """
    try:
        words = shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"--moe-config {overrides!r} cannot be read ({error})", remedy="close the quotes") from error
    for word in words:
        if word.lstrip("+~").partition("=")[0].partition(".")[0] not in _DEFAULTS:
            raise ConfigError(
                f"--moe-config takes model and routing only, not '{word}'", remedy="use fairseq's own flags"
            )
    chosen = dict(_DEFAULTS) | {k: v for k, _, v in (word.partition("=") for word in words) if k in _DEFAULTS}
    for group, name in chosen.items():
        if not re.fullmatch(r"[\w-]+", name):  # Hydra would read the config from any path
            raise ConfigError(f"--moe-config names no config of moe-train: {group}={name!r}", remedy="see configs/")
    keys = [word for word in words if word.partition("=")[0] not in _DEFAULTS]
    try:
        with initialize_config_dir(str(configs_directory()), version_base="1.3"):
            config = compose(overrides=[*(f"+{group}={name}" for group, name in chosen.items()), *keys])
    except HydraException as error:
        raise ConfigError(f"--moe-config '{overrides}' cannot be composed: {error}", remedy="see configs/") from error
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return build(ModelConfig, plain["model"], "model"), plain["routing"]
