"""Decides when two names or two values are the same, in any script, and when a value says nothing.

Everything that compares attributes uses this file: BM25's terms, the F1 of answers, the search for
repeated names. Text that is printed or shown to a model stays as it was written.
"""

import functools
import itertools
import re
import unicodedata

# The version of the rules in this file. Files made with them (BM25's statistics, look-alikes) carry
# it, so that they are never compared with texts folded by other rules. Version 1 knew only lower
# case and \w+.
VERSION = 2

# Unicode's stream-safe limit (UAX 15). No script has more marks on one letter, and Python sorts a
# letter's marks in quadratic time.
MAX_MARKS = 30

LONGEST_EMPTY = 100  # characters of a value that says nothing


# Fillers and selectors that are invisible, though their Unicode category is a letter's or a mark's.
# The tatweel (U+0640) only makes an Arabic word longer.
_UNSEEN = {0x34F, 0x640, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x3164}
_UNSEEN |= {0xAE, 0x2122, 0x2120}  # ® ™ ℠: "Lycra®" is "Lycra", and NFKC makes "tm" of ™
_UNSEEN |= {0xFFA0, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}


class _Signs(dict):
    """Code point -> the text that it counts as in a comparison; each is looked up once. A code
    point of no special category counts as itself."""

    def __missing__(self, code: int) -> str:
        sign = chr(code)
        category = unicodedata.category(sign)
        if code in _UNSEEN or category == "Cf":
            self[code] = ""
        elif category == "Cs":  # half a character
            self[code] = "\ufffd"
        elif category == "Nd":  # a digit of any script
            self[code] = str(unicodedata.decimal(sign))
        elif category == "Cc":
            self[code] = " "
        else:
            self[code] = sign
        return self[code]


_SIGNS = _Signs(
    {ord(sign): plain for plain, signs in {
        "'": "\u2018\u2019\u201b\u2032\u02bc", '"': "\u201c\u201d\u201e\u2033",
        "-": "\u2010\u2011\u2012\u2013\u2014\u2212", "x": "\u00d7", "/": "\u2044",
        ".": "\u066b", ",": "\u066c",
        "i": "\u0131",  # no language is known, so Turkish I, İ, ı and i are one letter
    }.items() for sign in signs}
)  # fmt: skip
_DOTTED = re.compile("i\u0307+")  # the lower case of İ
# ½, ² and the like after a digit: "38½" is not 381/2.
_BEHIND_DIGIT = re.compile(
    "(?<=\\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2089\u2150-\u215f])"
)


def fold(text: str) -> str:
    """The form in which texts are compared; doing it again changes nothing.

    Case folded (ß is ss, a final sigma a sigma), NFKC (full-width letters, ligatures, composed and
    decomposed accents), digits of all scripts as 0-9, invisible signs left out (joiners,
    zero-width blanks, soft hyphens, direction marks) and ®, ™ too, typographic quotes, dashes and ×
    as on a keyboard, runs of blanks and control characters as one blank. Accents count.
    """
    if text.isascii():
        if not text.isprintable():
            text = text.translate(_SIGNS)
        return " ".join(text.lower().split())
    text = few_marks(text.translate(_SIGNS))
    text = unicodedata.normalize("NFKC", _BEHIND_DIGIT.sub(" ", text)).translate(_SIGNS)
    text = _DOTTED.sub("i", text.casefold())
    text = few_marks(unicodedata.normalize("NFKC", text).translate(_SIGNS))
    return " ".join(text.split())


def few_marks(text: str) -> str:
    """The text without those marks that exceed MAX_MARKS on one letter."""
    if len(text) <= MAX_MARKS:
        return text
    kept, run = [], 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) else 0
        if run <= MAX_MARKS:
            kept.append(character)
    return "".join(kept)


_ASCII_WORD = re.compile(r"\d+(?:[.,]\d+)+|\w+")  # "1.5" stays one word
# Scripts without blanks between words: Thai, Lao, Burmese, Khmer, Chinese, Japanese.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3021-\u3029\u3031-\u30fa\u30fc-\u30ff"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Patterns of a word or an unspaced run, of the first letter of an unspaced run, and of a
    letter with its marks. They exist because `\\w` matches letters but no marks."""
    codes = range(0x300, 0x1F000)  # `fold` leaves no marks beyond this range
    marks = "".join(chr(code) for code in codes if unicodedata.category(chr(code))[0] == "M")
    spaced = rf"(?:(?![{_UNSPACED}])[\w{marks}])+"
    unspaced = rf"(?:(?=[\w{marks}])[{_UNSPACED}{marks}])+"
    return (
        re.compile(rf"\d+(?:[.,]\d+)+|{spaced}|{unspaced}"),
        re.compile(f"[{_UNSPACED}]"),
        re.compile(f"[^{marks}][{marks}]*|[{marks}]+"),
    )


def words(text: str) -> list[str]:
    """The words of a folded text, repeats kept. A letter's marks belong to it, as Hindi's vowels.

    Where a script has no blanks between words, every two neighbouring letters count as a word:
    "深蓝色" and "蓝色" then share 蓝色, and a phrase can agree in part. Korean has blanks.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text)
    word, unspaced, letter = _patterns()
    listed = []
    for run in word.findall(text):
        letters = letter.findall(run) if unspaced.match(run) else ()
        if len(letters) > 1:
            listed.extend(map("".join, itertools.pairwise(letters)))
        else:
            listed.append(run)
    return listed


# "none" and "no" are not among these: "pattern: none", "zip: no" tell of a product.
_EMPTY = """
unknown|unspecified|undetermined|undefined|undisclosed|unidentified|unclear|unsure|na|n a|nan|null|
nil|tbd|tba|does not apply|doesn t apply|don t know|i don t know|not sure|no answer|as shown|
as pictured|as described|see description|see photo|see photos|see picture|see pictures|see image
unbekannt|keine angabe|keine angaben|k a|nicht angegeben|nicht bekannt|nicht verfügbar|
nicht zutreffend|nicht erkennbar|nicht sichtbar|nicht spezifiziert
inconnu|inconnue|non spécifié|non spécifiée|non précisé|non précisée|non renseigné|non renseignée|
non disponible|non applicable|non visible|non communiqué|indéterminé
desconocido|desconocida|no especificado|no especificada|sin especificar|no disponible|no aplica|
no visible|no indicado|no indicada|n d|s d
sconosciuto|sconosciuta|non specificato|non specificata|non disponibile|non applicabile|
non indicato|non visibile
desconhecido|desconhecida|não especificado|não especificada|não informado|não informada|
não disponível|não se aplica|não visível
onbekend|niet gespecificeerd|niet bekend|niet van toepassing|n v t|niet zichtbaar
nieznany|nieznana|nieznane|brak danych|brak informacji|nie dotyczy|nie podano
bilinmiyor|belirtilmemiş|belirtilmedi|mevcut değil
неизвестно|неизвестен|неизвестна|не указано|не указан|не указана|нет данных|не применимо|н д
غير معروف|غير محدد|غير متوفر|لا ينطبق
अज्ञात|ज्ञात नहीं|उपलब्ध नहीं|लागू नहीं|निर्दिष्ट नहीं
ไม่ทราบ|ไม่ระบุ|ไม่มีข้อมูล|ไม่ปรากฏ
không rõ|không xác định|không có thông tin|tidak diketahui|tidak disebutkan|tidak tersedia
未知|不明|不详|不詳|未提供|未注明|未标明|未说明|未說明|未指定|未提及|不适用|不適用|无法确定|無法確定|
无法判断|无法识别|看不清|暂无|暂无信息|不确定
未記載|記載なし|該当なし|情報なし|指定なし|不明です|判別不可|確認できません
알 수 없음|알수없음|미상|불명|정보 없음|해당 없음|해당없음|미지정|확인 불가|명시되지 않음
"""
_SEPARATORS = re.compile(r"[\s_.,;:!?/\\|~*'\"()\[\]{}<>=\-\u2026\u3001\u3002\u00b7\u30fb\ufffd]+")
_EMPTY_VALUES = frozenset(
    _SEPARATORS.sub(" ", fold(value)) for value in re.split(r"[|\n]+", _EMPTY) if value
)
_SEEN = "specified|mentioned|stated|given|provided|listed|visible|available|known|shown|identified"
_SEEN += "|found|indicated|disclosed|determined|applicable|clear|determinable|discernible|legible"
_PLACE = "image|images|photo|photos|picture|pictures|text|title|description|listing|information"
_SUBJECT = "brand|brand name|manufacturer|model|material|colou?r|size|information|info|details|data"
_NOT_STATED = re.compile(
    rf"(?:(?:(?:it|this|{_SUBJECT}) )?(?:is )?(?:not|none)(?: clearly| explicitly)? (?:{_SEEN})"
    rf"|(?:unknown|unclear|unspecified)(?: (?:{_SUBJECT}))?"
    rf"|no (?:information|info|data|details)(?: (?:{_SEEN}))?"
    rf"|no visible brand(?: name)?|no brand(?: name)? (?:{_SEEN})"
    r"|(?:cannot|can not|can t|could not) (?:be )?(?:determined?|identified|identify|seen?|tell)"
    r"|unable to (?:determine|identify|tell|see))"
    rf"(?:(?: (?:in|from|on|by|or|and|the|this|provided|given|product|seller s|alone))*"
    rf" (?:{_PLACE}))*"
)


# The first three letters of values that say nothing: nearly all other values are ruled out by them.
_STARTS = {value[:3] for value in _EMPTY_VALUES}
_STARTS |= {"it", "thi", "is", "not", "non", "no", "can", "cou", "una"}
_STARTS |= {subject[:3] for subject in _SUBJECT.split("|")}


def is_empty(value: str) -> bool:
    """Whether a value says nothing: blank, a dash, "unknown", "n/a", "not visible in the photo".

    Such a value counts as an attribute nowhere: it makes no term and is not printed, shown, taught
    or counted as an answer. Case, punctuation and blanks do not matter. The list is modest, in the
    languages that sellers and models write; a phrase that it lacks is taken for a value.
    """
    return says_nothing(fold(value))


def says_nothing(folded: str) -> bool:
    """`is_empty` of a folded value."""
    start = folded[:4]
    if start[:1].isdigit() or (start.isalpha() and start[:3] not in _STARTS):
        return False  # nearly all values take this quick way out
    statement = folded.partition("(")[0] or folded  # "unknown (no label is seen)"
    if len(statement) > LONGEST_EMPTY:
        return False
    key = _SEPARATORS.sub(" ", statement).strip()
    return not key or key in _EMPTY_VALUES or _NOT_STATED.fullmatch(key) is not None
