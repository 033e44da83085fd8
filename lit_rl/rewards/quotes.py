r"""The text that a prompt wants to see in the picture.

A text stands in double quotes (`"X"`, `“X”`, `„X“`, `”X”`, `«X»`, `»X«`, `‹X›`, `「X」`, `『X』`, `''X''`, mixed pairs too), or, where a
prompt has none, in single ones (`'X'`, `‘X’`, `‚X‘`, `` `X` ``). Doubled (`""X""`) and escaped (`\"X\"`) quotes, as left over by CSV and
JSON, count like plain ones. The first pair with something in it counts, as in Flow-GRPO, and with it other quotes that stand inside.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable

from lit_rl.errors import ConfigError
from lit_rl.rewards.lettering import is_visible
from lit_rl.types import Info

SHOWN = 5
"""Rows that a message names."""

_Q = '["“”„‟″＂❝❞〝〞〟]'
_S = "['‘’‚‛＇`´❛❜]"
_LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # of a script that sets words apart: there a quote does not touch the next word
_INCHES = r'(?<=\d)["”″](?:\s|[-,.;:!?)\]]|$|[x×]\s*\d)'
_SOME = "{0,300}"  # characters between quotes that may hold quotes; keeps the search linear
_DOUBLE = re.compile(
    "|".join(
        (
            rf"\\+{_Q}(.{_SOME}?)\\+{_Q}",  # escaped
            rf"{_Q}{{2}}(?=[^\s\"“”„‟])(.{_SOME}?)(?<=[^\s\"“”„‟]){_Q}{{2}}(?!{_Q})",  # doubled
            rf'(?!{_INCHES})"((?:[^"“”„‟\\]|\\.|[“„‟][^"“”„‟]*[”“]){_SOME})"',  # straight ones, perhaps around typographic ones
            rf'“((?:[^"“”„‟]|[“„‟][^"“”„‟]*[”“]|"[^"“”„‟]*"){_SOME})”',
            rf'„((?:[^"“”„‟]|"[^"“”„‟]*"){_SOME})[“”]',
            rf'(?!{_INCHES}){_Q}([^"“”„‟″＂❝❞〝〞〟]*){_Q}',  # any other pair
            rf"«((?:[^«»]|«[^«»]*»){_SOME})»",
            r"[«»]([^«»]*)[«»]|[‹›]([^‹›]*)[‹›]|<<([^<>]+)>>|≪([^≪≫]+)≫",
            rf"「((?:[^「」]|「[^「」]*」){_SOME})」|『((?:[^『』]|『[^『』]*』){_SOME})』",
            r"｢([^｢｣]*)｣|﹁([^﹁﹂]*)﹂|﹃([^﹃﹄]*)﹄",
            rf"(?:``|(?<!')''|‘‘|’’|‚‚|,,)(?=[^\s'`‘’])(.{_SOME}?)(?<=[^\s'`‘’])(?:''|``|‘‘|’’|[“”])(?!')",
        )
    ),
    re.DOTALL,
)
_INSIDE = rf"[^'‘’‚‛＇`´❛❜]|(?<={_LETTER}){_S}(?={_LETTER})|\\{_S}|(?<=\s){_S}{_LETTER}+{_S}(?=\s)"  # don't, rock 'n' roll
_SINGLE = re.compile(rf"\\+'(.{_SOME}?)\\+'|(?<!{_LETTER}){_S}(?=[^\s'‘’‚‛`´])((?:{_INSIDE}){_SOME}?)(?<=\S){_S}(?!{_LETTER})", re.DOTALL)
_ENTITY = re.compile(r"&(?:quot|apos|[lr][ads]quo|bdquo|sbquo|#\d{1,7}|#x[0-9a-f]{1,6});", re.IGNORECASE)


def find_target(info: Info) -> str | None:
    """The text to show: `info["target"]`, else what the prompt quotes, else `info["text"]`; None when there is no text to be seen.

    Numbers are taken as they are written: `42` asks for `42`.
    """
    candidates = (info.get("target"), quoted(str(info["prompt"])), info.get("text"))
    return next((str(text) for text in candidates if _is_text(text)), None)


def quoted(prompt: str) -> str | None:
    """The text in the first quotes of a prompt, double ones before single ones, without surrounding white space."""
    prompt = _unwrap(_ENTITY.sub(lambda entity: html.unescape(entity[0]), prompt.strip()))
    for pattern in (_DOUBLE, _SINGLE):
        for match in pattern.finditer(prompt):
            text = re.sub(rf"\\+({_Q}|{_S})", r"\1", match[match.lastindex or 0]).strip()
            if is_visible(text):
                return text
    return None


def check_targets(rows: Iterable[Info]) -> None:
    """Raises ConfigError that names the prompts without a text to look for, by `where` (file and line) or `id` if they have them."""
    wrong = [row for row in rows if find_target(row) is None or isinstance(row.get("target"), list | dict | bool)]
    if not wrong:
        return
    lines = [f"{row.get('where') or row.get('id') or 'prompt'}: {_said(row)}" for row in wrong[:SHOWN]]
    more = [f"... and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
    count = f"{len(wrong)} prompt{'s do' if len(wrong) > 1 else ' does'} not say which text the picture should show, so OCR cannot score"
    cure = 'put the text in quotes (a sign that says "OPEN"), or give its row in a .jsonl file the key "target", or leave it out'
    raise ConfigError("\n  ".join([f"{count} {'them' if len(wrong) > 1 else 'it'}; {cure}", *lines, *more]))


def _said(row: Info) -> str:
    target = row.get("target")
    return f"{str(row['prompt'])[:200]!r}" + (f" with the target {target!r}, which is no text" if target is not None else "")


def _is_text(value: object) -> bool:
    if isinstance(value, float) and not math.isfinite(value):  # what a table writes into an empty cell
        return False
    return isinstance(value, str | int | float) and not isinstance(value, bool) and is_visible(str(value))


def _unwrap(prompt: str) -> str:
    """A prompt that is as a whole a quoted field of JSON or CSV, with its own quotes escaped or doubled, without that."""
    if '\\"' in prompt and re.fullmatch(r'"(?:[^"\\]|\\.)*"', prompt, re.DOTALL):
        return prompt[1:-1].replace('\\"', '"')
    if '""' in prompt[1:-1] and re.fullmatch(r'"(?:[^"]|"")*"', prompt):
        return prompt[1:-1].replace('""', '"')
    return prompt
