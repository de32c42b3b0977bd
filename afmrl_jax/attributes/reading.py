"""Reads attributes from the answers of models that were not trained on this project's format.

Such models answer with JSON of many shapes, lists, tables, commas for semicolons, markup, thoughts
before and remarks behind the answer. An answer is read if it holds pairs of name and value, and
refused otherwise. A generator that was trained here keeps the format: `text.parse` reads its
answers, strictly.
"""

import itertools
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from afmrl_jax.attributes.comparison import fold, is_empty, words
from afmrl_jax.attributes.json_text import WRAPPERS, read_json
from afmrl_jax.attributes.text import MAX_CHARACTERS, MAX_PAIRS, Parsed, Verdict, normalise

# The forms of an answer; "prose" if no pair could be read.
FORMS = ("plain", "commas", "list", "table", "json", "prose")

MAX_READ = 10 * MAX_CHARACTERS  # characters of an answer without its thoughts
LONGEST_NAME = 50  # characters
LONGEST_VALUE = 300  # characters
MOST_WORDS = 6  # words of a name
MOST_LETTERS = 12  # letters of a name in a script without blanks

Pairs = list[tuple[str, str]]


@dataclass
class _Read:
    """form: one of FORMS. pairs: as they were written. broken: True if a piece is not a pair."""

    form: str
    pairs: Pairs = field(default_factory=list)
    broken: bool = False


def read_answer(text: str, closed: bool = True) -> Parsed:
    """The attributes of any model's answer; never raises; takes linear time.

    closed: whether the model ended the text itself. The last pair of a text that was cut off is
    left out. Values that say nothing ("unknown") are left out, and equal pairs count once. Remarks
    on separate lines do no harm. A piece of a line or an item of a list that is no attribute makes
    the answer malformed, and so does a refusal. The result has no spans.
    """
    body = _answer_of(text)
    long = len(body) > MAX_READ
    read = _read(body[:MAX_READ], closed and not long)
    attributes: dict[str, str] = {}
    folded_values: dict[str, str] = {}  # folded name -> folded value
    faults = set()
    for name, value in read.pairs[:MAX_PAIRS]:
        if is_empty(value):
            continue
        key, folded = fold(name), fold(value)
        if not _is_attribute(name, value):
            faults.add(Verdict.MALFORMED)
        elif key not in folded_values:
            folded_values[key] = folded
            attributes |= normalise({name: value})
        elif folded_values[key] != folded:
            faults.add(Verdict.DUPLICATE)
    if read.broken or (body and not read.pairs and read.form != "json"):
        faults.add(Verdict.MALFORMED)
    if not closed:
        faults.add(Verdict.UNCLOSED)
    size = sum(len(name) + len(value) for name, value in read.pairs)
    if long or len(read.pairs) > MAX_PAIRS or size > MAX_CHARACTERS:
        faults.add(Verdict.TOO_LONG)
    if not attributes and Verdict.MALFORMED not in faults:
        faults.add(Verdict.EMPTY)
    verdict = next((fault for fault in Verdict if fault in faults), Verdict.VALID)
    is_read = read.pairs or verdict is Verdict.EMPTY
    return Parsed(attributes, verdict, form=read.form if is_read else "prose")


# ---- what an attribute looks like

_SPEAKING = re.compile(
    r"(?:i|i'm|we|you|here|here's|this|that|these|those|there|sorry|unfortunately|apologies|please|"
    r"sure|certainly|of course|okay|based on (?:the|this|your|what)|as an ai|let me|looking at|"
    r"(?:in|from) (?:the|this) (?:image|photo|picture|listing|text|title|description|provided)|"
    r"lo siento|es tut mir|leider|hier sind|désolé|je|voici|bien sûr|mi dispiace|desculpe|aquí|"
    r"claro|por supuesto|estos son|gerne|natürlich|certo|к сожалению|извините|вот|конечно)"
    r"(?![\w/-])|(?:the|a|an|my|it|its)\s|抱歉|对不起|對不起|很抱歉|以下|根据|好的|当然|申し訳|죄송"
)
_SENTENCE = re.compile(  # the beginning of a value that is a sentence, not an attribute's value
    r"(?:i (?:can|cannot|can't|am|don't|do not|could|would|will)|i'm|sorry|unfortunately|as an ai"
    r"|(?:it|this|they|there) (?:is|are|was|has|have|can|could|looks|appears|features))(?!\w)"
    r"|抱歉|对不起|很抱歉|申し訳|죄송"
)
_REMARK = re.compile(
    r"explanation|reasoning|disclaimer|summary|conclusion|error|refusal|message|warning|answer|"
    r"final answer|response|result|please note"
)
# A remark only if many words follow: "output" may also be an attribute, of a charger.
_NOTE = re.compile(r"notes?|nota|remark|comment|hinweis|output|注|备注|説明|说明")
_SHORT = "max|min|no|nr|approx|avg|temp|ref|art|dim|qty|vol|est|incl|ca"  # "max. load", "no. of"
_SHORT_WORD = re.compile(rf"(?:{_SHORT})", re.IGNORECASE)
_MARKS_OF_CODE = re.compile(rf"[{{}}\[\]<>\"]|[!?]\s|(?<!\w)(?!(?:{_SHORT})\.)\w*\.\s")
_SENTENCE_ENDS = re.compile(r"[.!?]\s+\w")


def _is_attribute(name: str, value: str) -> bool:
    """Whether a pair can be an attribute: a short name, a short value, no remark and no refusal."""
    folded = fold(name)
    name_words = words(folded)
    n_words = len(value.split())
    is_remark = _REMARK.fullmatch(folded) or (_NOTE.fullmatch(folded) and n_words > MOST_WORDS)
    return (
        len(name) <= LONGEST_NAME
        and any(map(str.isalpha, folded))
        and (len(folded.split()) <= MOST_WORDS and len(name_words) <= MOST_LETTERS)
        and name.count("(") == name.count(")")
        and not (is_remark or _SPEAKING.match(folded) or _MARKS_OF_CODE.search(folded))
        and len(value) <= LONGEST_VALUE
        and not value.startswith(("{", "["))
        and value.count("{") == value.count("}")  # the end of JSON that could not be read
        and not _SENTENCE.match(fold(value))
        and not (n_words > 2 * MOST_WORDS and _SENTENCE_ENDS.search(value))
    )


# ---- what stands around an answer

_THOUGHT = r"(?:think|thinking|thought|reasoning)"
_THOUGHT_BEGINS = re.compile(rf"<{_THOUGHT}>|\[THINK\]|◁think▷", re.IGNORECASE)
_THOUGHT_ENDS = re.compile(
    rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|channel\|>final<\|message\|>", re.IGNORECASE
)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_TAGS = re.compile(r"<\|[^|<>\n]{1,40}\|>|</?(?:s|bos|eos|end_of_turn|start_of_turn)>")


def _answer_of(text: str) -> str:
    """The text behind the thoughts, without a chat template's tokens. The begin or the end of the
    thoughts may be missing."""
    start = max((end.end() for end in _THOUGHT_ENDS.finditer(text)), default=0)
    text = text[start:]
    if begin := _THOUGHT_BEGINS.search(text):
        text = text[: begin.start()]
    if answer := _ANSWER.search(text):
        text = answer[1]
    return _TAGS.sub("", text).strip()


_FENCE = re.compile(r"```[\w-]*(.*?)(?:```|\Z)", re.DOTALL)


def _read(body: str, closed: bool) -> _Read:
    """Reads the first block that holds pairs: the fenced blocks are tried first, then all text."""
    for block in [fence[1] for fence in _FENCE.finditer(body)] + [body]:
        if (json_pairs := read_json(block)) is not None:
            pairs, whole = json_pairs
            pairs = [(name.replace("_", " "), value) for name, value in pairs]
            if len(pairs) == 1 and _wraps(*pairs[0]):
                pairs = (read := _read_lines(pairs[0][1], closed and whole)).pairs
                whole = whole and not read.broken
            return _Read("json", pairs, broken=not whole)
        read = _read_table(block, closed) or _read_lines(block, closed)
        if read.pairs:
            break
    return read


def _wraps(name: str, value: str) -> bool:
    """Whether the value is a text of pairs: {"attributes": "color: navy; sleeve: long"}."""
    return fold(name) in WRAPPERS and _SIMPLE_PAIR.match(value) is not None


# ---- tables

_TABLE_RULE = re.compile(r"[ \t]*\|?(?:[ \t]*:?-{2,}:?[ \t]*\|?)+[ \t]*")
_BAR = re.compile(r"(?<!\\)\|")
_COLUMN = re.compile(
    r"(?:key |product )?attributes?|(?:attribute )?name|property|key|field|feature|specification|"
    r"detail|属性名?|特征|名称"
)


def _read_table(body: str, closed: bool) -> _Read | None:
    """Reads a Markdown table: one pair per row, or names in the heading and values in the single
    row below it."""
    lines = body.splitlines()
    rule = next((n for n, s in enumerate(lines) if "|" in s and _TABLE_RULE.fullmatch(s)), 0)
    if not rule:
        return None
    heading, rows = _cells(lines[rule - 1]), []
    for line in lines[rule + 1 :]:
        if "|" not in line:
            break
        rows.append(_cells(line))
    names_values = bool(heading) and _COLUMN.fullmatch(fold(heading[0])) is not None
    if len(rows) == 1 and not (names_values and len(heading) == 2):
        whole = closed and len(heading) == len(rows[0])
        return _Read("table", list(zip(heading, rows[0])), broken=not whole)
    rows = rows if closed else rows[:-1]
    pairs = [(row[0], row[1]) for row in rows if len(row) > 1]
    is_table_of_pairs = (names_values or len(heading) == 2) and len(pairs) == len(rows)
    return _Read("table", pairs, broken=not is_table_of_pairs)


def _cells(row: str) -> list[str]:
    row = row.strip().removeprefix("|").removesuffix("|")
    return [_bare(cell.replace("\\|", "|")) for cell in _BAR.split(_MARKUP.sub("", row))]


# Words that introduce attributes ("the attributes are:"); no pair's name if another pair follows.
_OF_ATTRIBUTES = re.compile(
    r"attribut|atribut|eigenschaft|caracter[ií]sti|caractéristi|характеристик|атрибут|属性|속성"
    r"|(?:如下|以下の通り(?:です)?|以下のとおり(?:です)?|다음과 같습니다)$"
)


# ---- lines: lists, and several pairs on one line

_BULLET = re.compile(
    r"\s*(?:(?:[*•·●▪◦‣–—+-]|\(?\d{1,3}[.)、]|\(?[a-z]\))\s+|[•●▪・･■□◆◇▶►➤]|[-*](?=\*\*))+"
)
# Signs before a name, such as an emoji, or the dash of an item that shares a line with others.
_ORNAMENT = re.compile(r"(?:[^\w\s\\(\[{<\"'“„«‘「『$€£@#%&+]|[\d#]\ufe0f?\u20e3|\s)+")
_HEADING = re.compile(r"^\s*(?:#{1,6}|>)\s+")
_MARKUP = re.compile(r"\*\*|__|`")
_ITALIC = re.compile(r"(?<![\w*])\*([^*\n]{1,100})\*(?!\w)")
_GREETING = re.compile(
    r"^\s*(?:sure|certainly|of course|okay|ok|great|absolutely|bien sûr|claro|por supuesto|gerne"
    r"|natürlich|certo|конечно)\b[^:：;；]{0,80}?[!.,]\s+",
    re.IGNORECASE,
)
# Another pair begins after a comma, a bar, a full stop, a dash or a number if a name and a colon
# follow.
_NEXT_PAIR = re.compile(
    r"(?:[,，、،|.。]|(?<=\S)(?:\t|\s+(?:[-–—•·/]|\(?\d{1,2}[.)])\s))\s*(?=[^:：\n]{0,50}[^\W\d_])"
    rf"(?=(?:(?i:{_SHORT})\.\s)?[^\s:：;,，、،|.。][^:：;,，、،|.。\n]{{0,{LONGEST_NAME}}}(?::\s|：))"
)
# Characters that the project's format escapes are no separators here either.
_PIECE = re.compile(r"(?:\\[\\;:]|[^;；؛])++")
_SIMPLE_PAIR = re.compile(rf"[^:：,，、،.。]{{1,{LONGEST_NAME}}}[:：]")
_PAIR = re.compile(r"((?:\\[\\;:]|[^:：])*+)[:：](.*)", re.DOTALL)
_LIST = re.compile(r"\[([^\[\]{}]*)\]")  # a list of values
_ESCAPED = re.compile(r"\\([\\;:])")


class _Piece(NamedTuple):
    """A piece of text that may be a pair."""

    text: str
    indent: int  # blanks before its line
    is_item: bool  # an item of a list
    alone: bool  # the only piece of its line
    is_closed: bool  # a semicolon follows, so a dot at its end belongs to the value


def _read_lines(body: str, closed: bool) -> _Read:
    """Reads lists, and pairs that follow one another on one line or on several."""
    read = _Read("plain")
    pieces: list[_Piece] = []
    for line in body.splitlines():
        line = _HEADING.sub("", line, 1)
        bullet = _BULLET.match(line)
        text = _ITALIC.sub(r"\1", _MARKUP.sub("", line[bullet.end() if bullet else 0 :]))
        if bullet or text != line:
            read.form = "list"
        parts = [part for part in _PIECE.findall(_GREETING.sub("", text, 1)) if _bare(part)]
        within = [_pairs_in(part) for part in parts]
        # If semicolons separate pairs, commas and full stops belong to values ("Alien, Part 1: x").
        are_pairs = len(parts) > 1 and all(map(_SIMPLE_PAIR.match, parts))
        are_pairs = are_pairs and all(len(pairs) < 3 for pairs in within)
        split = parts if are_pairs else list(itertools.chain(*within))
        if len(split) > len(parts) and read.form == "plain":
            read.form = "commas"
        if len(split) > 1 and not _PAIR.match(split[0]) and _SPEAKING.match(fold(split[0])):
            split = split[1:]
        indent = len(line) - len(line.lstrip())
        for n, piece in enumerate(split, 1):
            is_closed = are_pairs and n < len(split)
            pieces.append(_Piece(piece, indent, bullet is not None, len(split) == 1, is_closed))
    heading = None  # index of the pair whose values are the items below it
    pieces = pieces if closed else pieces[:-1]
    for piece, below in itertools.zip_longest(pieces, pieces[1:]):
        name, value = _pair(piece.text, piece.is_closed)
        if name and _is_attribute(name, value[:LONGEST_VALUE]):
            heading = None if value else len(read.pairs)
            read.pairs.append((name, value))
        elif piece.is_item and not name and heading is not None:
            name, values = read.pairs[heading]
            read.pairs[heading] = name, f"{values}, {value}" if values else value
        elif piece.is_item and not name and below and below.is_item:
            # This is a heading if the items below it are indented further.
            read.broken |= below.indent <= piece.indent
        elif piece.is_item or not piece.alone:
            read.broken = True
    return read


def _pairs_in(part: str) -> list[str]:
    """Splits a part of a line into its pairs; "max. load" is one name."""
    split: list[str] = []
    for piece in reversed(_NEXT_PAIR.split(part)):
        if split and _SHORT_WORD.fullmatch(piece.strip()):
            split[-1] = f"{piece}. {split[-1]}"
        else:
            split.append(piece)
    return split[::-1]


def _pair(text: str, is_closed: bool = False) -> tuple[str, str]:
    """Name and value of a piece; the name is "" if the piece has none."""
    for _ in range(2):
        pair = _PAIR.match(text)
        if not pair:
            return "", _bare(text)
        ornament = _ORNAMENT.match(pair[1])
        name, text = _bare(pair[1][ornament.end() if ornament else 0 :]), pair[2]
        folded = fold(name)
        # "Here are the attributes: color: navy"
        is_heading = any(p.fullmatch(folded) for p in (_COLUMN, _REMARK, _NOTE))
        is_heading = is_heading or _SPEAKING.match(folded) or _OF_ATTRIBUTES.search(folded)
        if not is_heading or not _PAIR.match(text):
            break
    value = _bare(text, is_closed)
    if listed := _LIST.fullmatch(value):
        value = ", ".join(map(_bare, listed[1].split(",")))
    return _ESCAPED.sub(r"\1", name), _ESCAPED.sub(r"\1", value)


_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "‘": "’", "「": "」", "『": "』"}
_ABBREVIATION = re.compile(
    r"[^\W\d_]|.*\..*|inc|ltd|corp|co|approx|max|min|lbs|oz|in|ft|pcs|etc|usa|tbsp"
    r"|mr|mrs|ms|dr|st|jr|sr|assn|bros|mfg|intl",
    re.IGNORECASE,
)


def _bare(text: str, keeps_stop: bool = False) -> str:
    """The text without quotes around it and without a comma behind it. A full stop at its end is
    removed too, unless `keeps_stop`."""
    text = text.strip().rstrip(",，").rstrip()
    for _ in range(2):
        if not keeps_stop and text.endswith((".", "。")) and not text.endswith(".."):
            last = text[:-1].split()[-1:] or [""]
            if text[-1] == "。" or not _ABBREVIATION.fullmatch(last[0]):
                text = text[:-1].rstrip()
        if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
            text = text[1:-1].strip()
    return text
