"""Languages: name, family and script by code (ISO 639-1 where there is one, else 639-3; BCP 47 subtags after it).

`family` is the branch at which relatives are recognisable: Germanic, Romance, Slavic ... inside Indo-European, and the
family itself elsewhere (Turkic, Bantu). The genealogy follows Glottolog (Hammarström, Forkel, Haspelmath
and Bank, glottolog.org) and Ethnologue (Eberhard, Simons and Fennig), written down by hand at the level where the two
agree; creoles stand apart from their lexifiers, as they do in Ethnologue, and languages that somebody made are
"Constructed". Scripts are ISO 15924; of a language with several, the one that most of its text is written in.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Language:
    """One row of the table; `family` and `script` are empty where the table does not know."""

    code: str
    name: str
    family: str = ""
    script: str = ""


# A line a family and script; a language is code=Name.
_TABLE = """
Germanic Latn: af=Afrikaans, da=Danish, de=German, en=English, fo=Faroese, fy=Western Frisian, gsw=Alemannic
Germanic Latn: is=Icelandic, lb=Luxembourgish, nb=Norwegian Bokmål, nds=Low Saxon, nl=Dutch
Germanic Latn: nn=Norwegian Nynorsk, no=Norwegian, sco=Scots, sv=Swedish
Germanic Hebr: yi=Yiddish
Romance Latn: ast=Asturian, ca=Catalan, co=Corsican, es=Spanish, fr=French, frp=Francoprovençal, fur=Friulian
Romance Latn: gl=Galician, it=Italian, lad=Ladino, lij=Ligurian, lld=Ladin, mwl=Mirandese, oc=Occitan
Romance Latn: pcd=Picard, pt=Portuguese, rgn=Romagnol, rm=Romansh, ro=Romanian, rup=Aromanian, sc=Sardinian
Romance Latn: vec=Venetian, wa=Walloon
Italic Latn: la=Latin
Slavic Latn: bs=Bosnian, cnr=Montenegrin, cs=Czech, dsb=Lower Sorbian, hr=Croatian, hsb=Upper Sorbian
Slavic Latn: pl=Polish, sk=Slovak, sl=Slovenian
Slavic Cyrl: be=Belarusian, bg=Bulgarian, mk=Macedonian, ru=Russian, sr=Serbian, uk=Ukrainian
Baltic Latn: lt=Lithuanian, lv=Latvian
Celtic Latn: br=Breton, cy=Welsh, ga=Irish, gd=Scottish Gaelic, gv=Manx
Greek Grek: el=Greek
Albanian Latn: sq=Albanian, als=Tosk Albanian
Armenian Armn: hy=Armenian
Indo-Aryan Deva: bho=Bhojpuri, hi=Hindi, mag=Magahi, mai=Maithili, mr=Marathi, ne=Nepali, sa=Sanskrit
Indo-Aryan Beng: as=Assamese, bn=Bengali
Indo-Aryan Gujr: gu=Gujarati
Indo-Aryan Guru: pa=Punjabi
Indo-Aryan Orya: or=Odia
Indo-Aryan Sinh: si=Sinhala
Indo-Aryan Thaa: dv=Dhivehi
Indo-Aryan Arab: lah=Western Punjabi, sd=Sindhi, skr=Saraiki, ur=Urdu
Indo-Aryan Latn: hns=Sarnami Hindustani, rmn=Balkan Romani
Iranian Arab: ckb=Central Kurdish, fa=Persian, ps=Pashto
Iranian Cyrl: os=Ossetic, tg=Tajik
Iranian Latn: ku=Northern Kurdish, tly=Talysh
Semitic Arab: ar=Arabic
Semitic Hebr: he=Hebrew
Semitic Ethi: am=Amharic, ti=Tigrinya
Semitic Latn: mt=Maltese
Semitic Syrc: aii=Assyrian Neo-Aramaic
Berber Latn: kab=Kabyle, tzm=Central Atlas Tamazight
Berber Tfng: zgh=Standard Moroccan Tamazight
Cushitic Latn: aa=Afar, om=Oromo, so=Somali, sid=Sidamo
Chadic Latn: ha=Hausa
Turkic Latn: az=Azerbaijani, crh=Crimean Tatar, gag=Gagauz, kaa=Karakalpak, slr=Salar, tk=Turkmen, tr=Turkish
Turkic Latn: uz=Uzbek
Turkic Cyrl: alt=Southern Altai, kjh=Khakas, kk=Kazakh, ky=Kyrgyz, sah=Yakut, tt=Tatar, tyv=Tuvan, ba=Bashkir
Turkic Arab: azb=South Azerbaijani, ug=Uyghur
Finno-Ugric Latn: et=Estonian, fi=Finnish, fkv=Kven, hu=Hungarian, krl=Karelian, se=Northern Sami
Finno-Ugric Latn: smn=Inari Sami, sms=Skolt Sami, vep=Veps
Finno-Ugric Cyrl: koi=Komi-Permyak, udm=Udmurt
Samoyedic Cyrl: nio=Nganasan, yrk=Nenets
Mongolic Cyrl: mn=Mongolian
Tungusic Cyrl: eve=Even, evn=Evenki, gld=Nanai
Sinitic Hans: zh=Chinese, gan=Gan Chinese, hsn=Xiang Chinese, wuu=Wu Chinese, cjy=Jinyu Chinese
Sinitic Hant: yue=Cantonese, hak=Hakka Chinese, nan=Min Nan Chinese
Tibeto-Burman Mymr: my=Burmese
Tibeto-Burman Tibt: bo=Tibetan, dz=Dzongkha
Tibeto-Burman Latn: cnh=Haka Chin, lus=Mizo
Japonic Jpan: ja=Japanese
Koreanic Kore: ko=Korean
Dravidian Knda: kn=Kannada
Dravidian Mlym: ml=Malayalam
Dravidian Taml: ta=Tamil
Dravidian Telu: te=Telugu
Austronesian Latn: ace=Acehnese, ban=Balinese, bik=Central Bikol, bug=Buginese, ceb=Cebuano, ch=Chamorro
Austronesian Latn: fj=Fijian, haw=Hawaiian, hil=Hiligaynon, id=Indonesian, ilo=Ilocano, jv=Javanese
Austronesian Latn: mad=Madurese, mg=Malagasy, mi=Māori, min=Minangkabau, ms=Malay, pam=Kapampangan, sm=Samoan
Austronesian Latn: su=Sundanese, tet=Tetum, tl=Tagalog, to=Tongan, ty=Tahitian, war=Waray, zlm=Malay
Bantu Latn: bem=Bemba, kg=Kongo, lg=Ganda, ln=Lingala, lua=Luba-Kasai, ng=Ndonga, nr=South Ndebele
Bantu Latn: nso=Northern Sotho, ny=Nyanja, rn=Rundi, rw=Kinyarwanda, sn=Shona, ss=Swati, st=Southern Sotho
Bantu Latn: sw=Swahili, tn=Tswana, ts=Tsonga, ve=Venda, xh=Xhosa, zu=Zulu
Volta-Niger Latn: ee=Ewe, fon=Fon, ig=Igbo, yo=Yoruba
Kwa Latn: ak=Akan
Atlantic Latn: ff=Fula, fuf=Pular, fuv=Nigerian Fulfulde, wo=Wolof
Mande Latn: bm=Bambara, dyu=Dyula
Tai Thai: th=Thai
Tai Laoo: lo=Lao
Tai Mymr: shn=Shan
Tai Latn: za=Zhuang
Kartvelian Geor: ka=Georgian
Austroasiatic Latn: vi=Vietnamese, kha=Khasi
Austroasiatic Khmr: km=Khmer
Hmong-Mien Latn: hnj=Hmong Njua
Basque Latn: eu=Basque
Northwest-Caucasian Cyrl: ab=Abkhaz, ady=Adyghe, kbd=Kabardian
Eskimo-Aleut Latn: kl=Greenlandic
Eskimo-Aleut Cans: iu=Inuktitut
Quechuan Latn: qu=Quechua, quy=Ayacucho Quechua
Aymaran Latn: ay=Aymara, ayr=Central Aymara
Tupian Latn: gn=Guaraní
Uto-Aztecan Latn: nhn=Central Nahuatl
Mayan Latn: yua=Yucatec Maya, quc=K'iche', kek=Q'eqchi'
Na-Dene Latn: nv=Navajo
Iroquoian Cher: chr=Cherokee
Creole Latn: acf=Saint Lucian Creole, bi=Bislama, crs=Seychellois Creole, ht=Haitian Creole
Creole Latn: jam=Jamaican Creole, kea=Kabuverdianu, kri=Krio, mfe=Morisyen, pap=Papiamento, pcm=Nigerian Pidgin
Creole Latn: pov=Upper Guinea Creole, sg=Sango, tpi=Tok Pisin
Constructed Latn: eo=Esperanto, ia=Interlingua, io=Ido
"""


def _read_table() -> dict[str, Language]:
    table = {}
    for line in _TABLE.strip().splitlines():
        head, _, rest = line.partition(": ")
        family, script = head.split()
        for entry in rest.split(", "):
            code, _, name = entry.partition("=")
            table[code] = Language(code, name, family, script)
    return table


LANGUAGES = _read_table()

# Codes that mean one of the table's languages: bibliographic, macrolanguage and older ones.
_ALIASES = {
    **{"arb": "ar", "azj": "az", "cat": "ca", "cmn": "zh", "cri": "pov", "deu": "de", "ekk": "et", "eng": "en"},
    **{"fra": "fr", "gug": "gn", "hau": "ha", "hin": "hi", "hnd": "lah", "in": "id", "iw": "he", "ji": "yi"},
    **{"khk": "mn", "kmr": "ku", "lvs": "lv", "nob": "nb", "nno": "nn", "npi": "ne", "ory": "or", "pes": "fa"},
    **{"plt": "mg", "pbu": "ps", "rus": "ru", "spa": "es", "swh": "sw", "uzn": "uz", "ydd": "yi", "zho": "zh"},
}
_SCRIPTS = {language.script for language in LANGUAGES.values()} | {"Hani", "Java", "Lana", "Adlm", "Gran"}
_REGION_NAMES = {"Hans": "Simplified", "Hant": "Traditional"}


def split_code(code: str) -> tuple[str, str, str]:
    """``(language, script, rest)`` of a tag in any common spelling: pt_BR, zh-Hant, sr@latin, ZH_hant, de-1996.

    `language` is the table's code for it; `script` and `rest` are empty where the tag has none.
    """
    parts = code.replace("_", "-").replace("@", "-").split("-")
    base = _ALIASES.get(parts[0].lower(), parts[0].lower())
    script, rest = "", []
    for part in parts[1:]:
        title = {"latin": "Latn", "cyrillic": "Cyrl"}.get(part.lower(), part.title())
        if title in _SCRIPTS:
            script = title
        elif part:
            rest.append(part.upper() if len(part) == 2 else part)
    return base, script, "-".join(rest)


def lookup(code: str) -> Language:
    """The language of a tag; regional and script variants share the name (with what differs) and family.

    A code that the table does not hold comes back with its code as the name, and no family or script.
    """
    base, script, rest = split_code(code)
    known = LANGUAGES.get(base, Language(base, base))
    tag = "-".join(part for part in (base, script, rest) if part)
    what = ", ".join(part for part in (_REGION_NAMES.get(script, script), rest) if part)
    return Language(tag, f"{known.name} ({what})" if what else known.name, known.family, script or known.script)


# First word of a character's Unicode name -> ISO 15924, for the scripts of the table that one word identifies.
_SCRIPT_WORDS = {
    **{"LATIN": "Latn", "CYRILLIC": "Cyrl", "GREEK": "Grek", "ARMENIAN": "Armn", "HEBREW": "Hebr", "ARABIC": "Arab"},
    **{"DEVANAGARI": "Deva", "BENGALI": "Beng", "GURMUKHI": "Guru", "GUJARATI": "Gujr", "ORIYA": "Orya"},
    **{"TAMIL": "Taml", "TELUGU": "Telu", "KANNADA": "Knda", "MALAYALAM": "Mlym", "SINHALA": "Sinh", "THAANA": "Thaa"},
    **{"THAI": "Thai", "LAO": "Laoo", "TIBETAN": "Tibt", "MYANMAR": "Mymr", "GEORGIAN": "Geor", "HANGUL": "Kore"},
    **{"ETHIOPIC": "Ethi", "CHEROKEE": "Cher", "CANADIAN": "Cans", "KHMER": "Khmr", "TIFINAGH": "Tfng"},
    **{"SYRIAC": "Syrc", "HIRAGANA": "Jpan", "KATAKANA": "Jpan", "CJK": "Hani", "JAVANESE": "Java"},
    **{"VAI": "Vaii", "YI": "Yiii", "CHAKMA": "Cakm", "ADLAM": "Adlm", "GRANTHA": "Gran", "MONGOLIAN": "Mong"},
}


def script_of(texts: Iterable[str], limit: int = 20_000) -> str:
    """Script of most letters of `texts` (the first `limit` characters), ISO 15924; empty if it is none known here.

    Han characters with a tenth or more of kana are Jpan; without, they are Hani (simplified or traditional not told).
    """
    counts: Counter[str] = Counter()
    seen = 0
    for text in texts:
        for character in text:
            if character.isalpha():
                counts[_SCRIPT_WORDS.get(unicodedata.name(character, "").split(" ")[0], "")] += 1
        seen += len(text)
        if seen > limit:
            break
    if not counts:
        return ""
    if counts["Jpan"] >= 0.1 * counts.total():
        return "Jpan"
    return counts.most_common(1)[0][0]
