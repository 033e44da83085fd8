"""Questions to the judge of UniGenBench: a template with the prompt, its testpoints and their descriptions filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_rl.errors import ConfigError
from lit_rl.evaluation.unigenbench import Language
from lit_rl.rewards.judges.messages import harmless

FIELDS = ("{prompt}", "{testpoints}", "{descriptions}")

FORM = """<description>
<prompt>{prompt}</prompt>
<checkpoint>{testpoints}</checkpoint>
<analysis>["...", ...]</analysis>
<score>[0 or 1, ...]</score>
</description>"""

TEMPLATES: Mapping[Language, str] = {
    "en": f"""You judge whether a generated image does what its prompt asks for.

Step 1: read the prompt of the image, and the testpoints in it that you are to judge.
Prompt: 「{{prompt}}」
Testpoints: {{testpoints}}
What each of them is about here:
{{descriptions}}

Step 2: look at the image and decide for each testpoint, in this order, whether it is fulfilled: 1, or not: 0.

Rules: judge each testpoint by itself. What cannot be seen is not fulfilled. Give one reason and one number for each testpoint. Write
nothing outside this form:
{FORM}""",
    "zh": f"""请判断一张生成的图像是否符合它的提示词。

第一步：阅读图像的提示词和需要判断的考点。
提示词：「{{prompt}}」
考点：{{testpoints}}
各考点在此处的含义：
{{descriptions}}

第二步：观察图像，按顺序判断每个考点是否满足：满足为 1，不满足为 0。

要求：逐个独立判断；看不到的内容视为不满足；每个考点给出一个理由和一个数字；除以下格式外不要输出任何内容：
{FORM.replace("0 or 1", "0 或 1")}""",
}
"""In words of our own; a judge answers best to the instruction that it was trained with, which a user gives as a file."""


@dataclass(frozen=True, kw_only=True)
class Templates:
    """Files with the judge's instruction; {prompt}, {testpoints} and {descriptions} in them are filled in. None: a short one of ours.

    Args:
        en: Of sets with scoring unigenbench/en.
        zh: Of sets with scoring unigenbench/zh.
    """

    en: str | None = None
    zh: str | None = None

    def read(self, language: Language) -> str:
        """The instruction of a language."""
        return read_template(self.zh if language == "zh" else self.en, language)


def read_template(file: str | None, language: Language) -> str:
    """The template in a file, or ours. Raises ConfigError where the file is missing or leaves out a field."""
    if file is None:
        return TEMPLATES[language]
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"templates.{language}: {file} cannot be read as UTF-8 text ({error})") from error
    if missing := [name for name in FIELDS[:2] if name not in text]:
        raise ConfigError(f"templates.{language}: {file} lacks {' and '.join(missing)}, where the judge reads what it judges")
    if missing := [tag for tag in ("<analysis>", "<score>") if tag not in text]:
        raise ConfigError(f"templates.{language}: {file} does not ask for {' and '.join(missing)}, which the answer is read from")
    return text


def instruction(template: str, *, prompt: str, testpoints: Sequence[str], descriptions: Sequence[str]) -> str:
    """The template with its fields filled in: the testpoints as a list of Python, a line for each description.

    Nothing in a prompt passes for a tag of the answer, or for another field.
    """
    lines = "\n".join(f"- {point}: {text}" for point, text in zip(testpoints, descriptions, strict=True) if text)
    values = {"{prompt}": harmless(prompt), "{testpoints}": str(list(testpoints)), "{descriptions}": harmless(lines)}
    return re.sub("|".join(map(re.escape, FIELDS)), lambda field: values[field[0]], template)
