"""``corpus=flores200``: FLORES-200 (NLLB team 2022), the same sentences in 200 languages: ``dev`` and ``devtest``.

They become valid and test. There is no training text in it: that comes from ``corpus.train_path`` (in the layout of
``corpus=text``), or the folder is made for evaluation alone, with the vocabulary of another one (``vocabulary.reuse``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_train.config.corpus import CorpusConfig
from moe_train.data.corpora.base import CorpusText, corpus_folder, files_text, listing, register
from moe_train.data.corpora.text import texts_of_folder
from moe_train.data.pairs import Pair
from moe_train.data.progress import Progress
from moe_train.errors import ConfigError, DataError, did_you_mean

LAYOUT = "unpack flores200_dataset.tar.gz there: dev/eng_Latn.dev, devtest/eng_Latn.devtest"
_SPLITS = {"valid": "dev", "test": "devtest"}

# The usual short codes; any other language is named as FLORES-200 names it, or through corpus.codes.
_CODES = dict(
    item.split("=")
    for item in """
    af=afr_Latn am=amh_Ethi ar=arb_Arab az=azj_Latn be=bel_Cyrl bg=bul_Cyrl bn=ben_Beng bs=bos_Latn ca=cat_Latn
    cs=ces_Latn cy=cym_Latn da=dan_Latn de=deu_Latn el=ell_Grek en=eng_Latn eo=epo_Latn es=spa_Latn et=est_Latn
    eu=eus_Latn fa=pes_Arab fi=fin_Latn fr=fra_Latn ga=gle_Latn gl=glg_Latn gu=guj_Gujr ha=hau_Latn he=heb_Hebr
    hi=hin_Deva hr=hrv_Latn hu=hun_Latn hy=hye_Armn id=ind_Latn ig=ibo_Latn is=isl_Latn it=ita_Latn ja=jpn_Jpan
    ka=kat_Geor kk=kaz_Cyrl km=khm_Khmr kn=kan_Knda ko=kor_Hang lt=lit_Latn lv=lvs_Latn mk=mkd_Cyrl ml=mal_Mlym
    mr=mar_Deva ms=zsm_Latn mt=mlt_Latn my=mya_Mymr nb=nob_Latn ne=npi_Deva nl=nld_Latn nn=nno_Latn pa=pan_Guru
    pl=pol_Latn ps=pbt_Arab pt=por_Latn ro=ron_Latn ru=rus_Cyrl si=sin_Sinh sk=slk_Latn sl=slv_Latn so=som_Latn
    sq=als_Latn sr=srp_Cyrl sv=swe_Latn sw=swh_Latn ta=tam_Taml te=tel_Telu tg=tgk_Cyrl th=tha_Thai tl=tgl_Latn
    tr=tur_Latn uk=ukr_Cyrl ur=urd_Arab uz=uzn_Latn vi=vie_Latn xh=xho_Latn yo=yor_Latn zh=zho_Hans zu=zul_Latn
    """.split()  # noqa: SIM905
)


@register("flores200")
def read_flores200(config: CorpusConfig, progress: Progress) -> list[CorpusText]:
    """Held-out sets of the wanted pairs, and the training text if there is some.

    Raises:
        ConfigError: neither languages nor pairs nor training text say which of the 40,000 directions are wanted.
        DataError: no file of the layout, or a language that FLORES-200 has not.
    """
    folder = corpus_folder(config)
    if not (folder / "dev").is_dir() or not (folder / "devtest").is_dir():
        there = listing(path.name for path in folder.iterdir())
        raise DataError(f"this is not FLORES-200 (found: {there or 'nothing'})", str(folder), LAYOUT)
    training = _training(config.train_path)
    held_out = [
        files_text(pair, split, *(_file(folder, split, language, config) for language in pair))
        for pair in _pairs(config, training)
        for split in _SPLITS
    ]
    return training + held_out


def _training(path: str | None) -> list[CorpusText]:
    if not path:
        return []
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError("the folder of the training text does not exist", str(folder), "correct corpus.train_path=…")
    return [text for text in texts_of_folder(folder) if text.split in ("train", None)]


def _pairs(config: CorpusConfig, training: Sequence[CorpusText]) -> list[Pair]:
    if config.pairs:
        return [Pair.parse(name) for name in config.pairs]
    if config.languages:
        return [Pair("en", language) for language in config.languages if language != "en"]
    if training:
        return sorted({text.sides for text in training if isinstance(text.sides, Pair)})
    raise ConfigError(
        "corpus=flores200 must be told which languages or pairs",
        "corpus.languages",
        "add 'corpus.languages=[en,de,fr]' (from and into English), or 'corpus.pairs=[de-fr]'",
    )


def _file(folder: Path, split: str, language: str, config: CorpusConfig) -> Path:
    name = _SPLITS[split]
    code = config.codes.get(language, _CODES.get(language, language))
    path = folder / name / f"{code}.{name}"
    if not path.is_file():
        known = [p.name.removesuffix(f".{name}") for p in (folder / name).glob(f"*.{name}")]
        raise DataError(f"FLORES-200 has no language '{code}'", str(folder / name), did_you_mean(code, known))
    return path
