"""Language codes: which name the same language, which are English, and the usual script of a language.

``en``, ``eng`` and ``eng_Latn`` are one language: two and three letters of ISO 639, and the names of FLORES-200, which
add the script. A script other than the usual one makes a different language (``sr_Latn``), and so does a region
(``pt_BR``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from moe_train.errors import did_you_mean

# Three letters and the usual script, as in FLORES-200 where it has the language; then other names: two letters,
# ISO 639-2 codes, those of a macrolanguage of which it is the usual member, and obsolete ones.
_LANGUAGES = """
    aar_Latn=aa abk_Cyrl=ab ace_Latn acm_Arab acq_Arab adx_Tibt aeb_Arab afr_Latn=af ajp_Arab aka_Latn=ak
    als_Latn=sq/sqi/alb amh_Ethi=am apc_Arab arb_Arab=ar/ara arg_Latn=an ars_Arab ary_Arab arz_Arab asm_Beng=as
    ast_Latn ava_Cyrl=av awa_Deva ayr_Latn=ay/aym azb_Arab azj_Latn=az/aze bak_Cyrl=ba bam_Latn=bm ban_Latn
    bel_Cyrl=be bem_Latn ben_Beng=bn bho_Deva bis_Latn=bi bjn_Latn blk_Mymr blt_Tavt bod_Tibt=bo/tib bos_Latn=bs
    bre_Latn=br bug_Latn bul_Cyrl=bg cat_Latn=ca cdo_Hans ceb_Latn ces_Latn=cs/cze cha_Latn=ch che_Cyrl=ce
    chu_Cyrl=cu chv_Cyrl=cv cjk_Latn cjy_Hans ckb_Arab cor_Latn=kw cos_Latn=co cpx_Hans crh_Latn cym_Latn=cy/wel
    czh_Hans czo_Hans dan_Latn=da deu_Latn=de/ger dik_Latn div_Thaa=dv dyu_Latn dzo_Tibt=dz ell_Grek=el/gre
    eng_Latn=en epo_Latn=eo est_Latn=et/ekk eus_Latn=eu/baq ewe_Latn=ee fao_Latn=fo fij_Latn=fj fin_Latn=fi
    fon_Latn fra_Latn=fr/fre fry_Latn=fy fur_Latn fuv_Latn=ff/ful gan_Hans gaz_Latn=om/orm gla_Latn=gd
    gle_Latn=ga glg_Latn=gl glv_Latn=gv grc_Grek grn_Latn=gn guj_Gujr=gu hak_Hans hat_Latn=ht hau_Latn=ha
    hbs_Latn=sh heb_Hebr=he/iw her_Latn=hz hin_Deva=hi hmo_Latn=ho hne_Deva hrv_Latn=hr hsn_Hans hun_Latn=hu
    hye_Armn=hy/arm ibo_Latn=ig ido_Latn=io iii_Yiii=ii iku_Cans=iu ile_Latn=ie ilo_Latn ina_Latn=ia
    ind_Latn=id/in ipk_Latn=ik isl_Latn=is/ice ita_Latn=it jav_Latn=jv/jw jpn_Jpan=ja kab_Latn kac_Latn
    kal_Latn=kl kam_Latn kan_Knda=kn kas_Arab=ks kat_Geor=ka/geo kaz_Cyrl=kk kbp_Latn kea_Latn khb_Talu khg_Tibt
    khk_Cyrl=mn/mon khm_Khmr=km kht_Mymr kik_Latn=ki kin_Latn=rw kir_Cyrl=ky kmb_Latn kmr_Latn=ku/kur
    kom_Cyrl=kv kon_Latn=kg kor_Hang=ko ksw_Mymr kua_Latn=kj kxm_Khmr lao_Laoo=lo lat_Latn=la lbj_Tibt lij_Latn
    lim_Latn=li lin_Latn=ln lit_Latn=lt lmo_Latn ltg_Latn ltz_Latn=lb lua_Latn lub_Latn=lu lug_Latn=lg luo_Latn
    lus_Latn lvs_Latn=lv/lav lzh_Hans mag_Deva mah_Latn=mh mai_Deva mal_Mlym=ml mar_Deva=mr min_Latn
    mkd_Cyrl=mk/mac mlt_Latn=mt mni_Beng mnp_Hans mnw_Mymr mos_Latn mri_Latn=mi/mao mya_Mymr=my/bur nan_Hans
    nau_Latn=na nav_Latn=nv nbl_Latn=nr nde_Latn=nd ndo_Latn=ng nld_Latn=nl/dut nno_Latn=nn nob_Latn=nb nod_Lana
    nor_Latn=no npi_Deva=ne/nep nso_Latn nus_Latn nya_Latn=ny oci_Latn=oc oji_Cans=oj ory_Orya=or/ori
    oss_Cyrl=os pag_Latn pan_Guru=pa pap_Latn pbt_Arab=ps/pus pes_Arab=fa/fas/per plt_Latn=mg/mlg pol_Latn=pl
    por_Latn=pt prs_Arab quy_Latn=qu/que rki_Mymr roh_Latn=rm ron_Latn=ro/rum/mo run_Latn=rn rus_Cyrl=ru
    ryu_Jpan sag_Latn=sg san_Deva=sa sat_Olck scn_Latn shn_Mymr sin_Sinh=si slk_Latn=sk/slo slv_Latn=sl
    sme_Latn=se smo_Latn=sm sna_Latn=sn snd_Arab=sd som_Latn=so sot_Latn=st sou_Thai spa_Latn=es srd_Latn=sc
    srp_Cyrl=sr ssw_Latn=ss sun_Latn=su swe_Latn=sv swh_Latn=sw/swa szl_Latn tah_Latn=ty tam_Taml=ta tat_Cyrl=tt
    tdd_Tale tel_Telu=te tgk_Cyrl=tg tgl_Latn=tl tha_Thai=th tir_Ethi=ti ton_Latn=to tpi_Latn tsn_Latn=tn
    tso_Latn=ts tts_Thai tuk_Latn=tk tum_Latn tur_Latn=tr twi_Latn=tw tzm_Tfng uig_Arab=ug ukr_Cyrl=uk umb_Latn
    urd_Arab=ur uzn_Latn=uz/uzb vec_Latn ven_Latn=ve vie_Latn=vi vol_Latn=vo war_Latn wln_Latn=wa wol_Latn=wo
    wuu_Hans xho_Latn=xh ydd_Hebr=yi/yid/ji yor_Latn=yo yue_Hant zha_Latn=za zho_Hans=zh/chi/cmn
    zsm_Latn=ms/msa/may zul_Latn=zu
"""
_SCRIPT = re.compile(r"[A-Za-z]{4}")
_SCRIPT_WORDS = {
    "latin": "Latn",
    "cyrillic": "Cyrl",
    "arabic": "Arab",
    "devanagari": "Deva",
    "hani": "Hans",
    "kore": "Hang",
}


def _read_table() -> tuple[dict[str, str], dict[str, str]]:
    """Two tables: name of a language -> three letters; three letters -> usual script."""
    letters: dict[str, str] = {}
    scripts: dict[str, str] = {}
    for entry in _LANGUAGES.split():
        code, _, others = entry.partition("=")
        language, script = code.split("_")
        scripts[language] = script
        for name in (language, *filter(None, others.split("/"))):
            letters[name] = language
    return letters, scripts


_LETTERS: Mapping[str, str]
_SCRIPTS: Mapping[str, str]
_LETTERS, _SCRIPTS = map(MappingProxyType, _read_table())


@dataclass(frozen=True)
class Language:
    """A parsed language code; equal for codes of the same language.

    Attributes:
        letters: three letters of ISO 639-3, or the code's own where it is not known.
        script: of ISO 15924, such as ``Latn``: that of the code, else the usual one ("": unknown).
        variant: region and other parts, in lower case.
    """

    letters: str
    script: str = ""
    variant: tuple[str, ...] = ()

    @classmethod
    def of(cls, code: str) -> Language:
        """Reads ``de``, ``deu``, ``deu_Latn``, ``pt_BR``, ``sr@latin``, ``zh@hans`` …"""
        base, *parts = re.split(r"[_@-]", code)
        letters = _LETTERS.get(base.lower(), base.lower())
        script, variant = "", []
        for part in parts:
            if not script and (_SCRIPT.fullmatch(part) or part.lower() in _SCRIPT_WORDS):
                script = _SCRIPT_WORDS.get(part.lower(), part.title())
            else:
                variant.append(part.lower())
        return cls(letters, script or _SCRIPTS.get(letters, ""), tuple(variant))

    def __str__(self) -> str:
        """As in FLORES-200: ``deu_Latn``."""
        return "_".join(filter(None, (self.letters, self.script, *self.variant)))


def is_english(code: str) -> bool:
    """Whether a code such as ``en``, ``en_GB`` or ``eng_Latn`` is English."""
    return Language.of(code).letters == "eng"


def is_same(code: str, other: str) -> bool:
    """Whether two codes name the same language: ``en`` and ``eng_Latn`` do, ``en`` and ``en_GB`` do not."""
    return code == other or Language.of(code) == Language.of(other)


def find_same(code: str, known: Iterable[str]) -> str | None:
    """The code of a language in ``known``: the same code, else the first that names the same language."""
    known = list(known)
    return code if code in known else next((other for other in known if is_same(code, other)), None)


def one_code_each(codes: Iterable[str]) -> dict[str, str]:
    """Each code -> the first of those that name the same language."""
    codes = list(codes)
    first: dict[Language, str] = {}
    for code in codes:
        first.setdefault(Language.of(code), code)
    return {code: first[Language.of(code)] for code in codes}


def find_english(codes: Sequence[str]) -> str | None:
    """The code of English among these; a regional one (``en_GB``) only where there is no other."""
    return find_same("en", codes) or next(filter(is_english, codes), None)


def offer_language(code: str, known: Iterable[str]) -> str:
    """The part of a message that suggests the same language under another code, else near spellings."""
    known = list(known)
    same = find_same(code, known)
    return f"did you mean {same!r}?" if same else did_you_mean(code, known)


def offer_direction(name: str, known: Iterable[str]) -> str:
    """The part of a message that suggests the same direction in other codes, else near spellings."""
    known = list(known)
    wanted = [*map(Language.of, name.split("-"))]
    same = next((other for other in known if [*map(Language.of, other.split("-"))] == wanted), None)
    return f"did you mean {same!r}?" if same else did_you_mean(name, known)
