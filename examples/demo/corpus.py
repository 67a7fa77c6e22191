"""Real English without a download: the documentation strings of the installed Python standard library.

`python corpus.py DIR` writes DIR/pairs.jsonl (questions and answers as chat messages) and DIR/text.jsonl (every
docstring as plain text, for the base model). The same interpreter always gives the same files.
"""

import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

# Modules that open windows or browsers, print poems, start servers, or are tests and demos.
SKIP = re.compile(
    r"^(antigravity|this|idlelib|turtle\w*|tkinter|lib2to3|test|ensurepip|venv|distutils|pip|_\w*|\w+\.__main__)"
)
LONGEST = 320
"""Characters of an answer: the demo's model reads 256 tokens."""


def main(directory: Path) -> int:
    """Writes both files; the number of pairs."""
    documented = list(documents())
    directory.mkdir(parents=True, exist_ok=True)
    texts = dict.fromkeys(text for _, text in documented)
    write(directory / "text.jsonl", ({"text": text} for text in texts))
    pairs, seen = [], set()
    for question, text in documented:
        answer = first_words(text)
        if answer and answer.lower() not in seen:
            seen.add(answer.lower())
            pairs.append(
                {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
            )
    write(directory / "pairs.jsonl", pairs)
    return len(pairs)


def write(path: Path, rows: Any) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def documents() -> Iterator[tuple[str, str]]:
    """(question, docstring) of every public module, class, function and method, in the order of their names."""
    for module in modules():
        name = module.__name__
        label = "" if name == "builtins" else f"{name}."
        yield from document(f"What is the module {name} for?", module)
        for member, value in sorted(vars(module).items()):
            if member.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isclass(value):
                yield from document(f"What is {label}{member}?", value)
                for method, function in sorted(vars(value).items()):
                    if not method.startswith("_") and (inspect.isroutine(function) or isinstance(function, property)):
                        yield from document(f"What does {label}{member}.{method} do?", function)
            elif inspect.isroutine(value):
                yield from document(f"What does {label}{member} do?", value)


def modules() -> Iterator[ModuleType]:
    """The standard library's public modules and their submodules, imported in silence."""
    names = [name for name in sorted(sys.stdlib_module_names) if not SKIP.match(name)]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name in names:
            try:
                module = importlib.import_module(name)
            except ImportError:  # not on this platform
                continue
            yield module
            for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}."), key=lambda i: i.name):
                if any(part.startswith("_") or part in ("test", "tests") for part in info.name.split(".")):
                    continue
                try:
                    yield importlib.import_module(info.name)
                except ImportError:
                    continue


def document(question: str, value: Any) -> Iterator[tuple[str, str]]:
    text = inspect.cleandoc(value.__doc__) if isinstance(value.__doc__, str) else ""
    if len(text) >= 20 and text.isascii():
        yield question, text


def first_words(text: str) -> str:
    """The first paragraphs of prose, at most LONGEST characters; empty where there is none."""
    answer = ""
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split()).replace("``", "`")
        prose = re.match(r"[A-Z].*[a-z]{2}.* .*[a-z.]", paragraph) and not re.search(r">>>|->|--|::|\|", paragraph)
        if not prose or len(answer) + len(paragraph) + 1 > LONGEST:
            if answer:
                break
            continue  # a signature, or an example, before the prose
        answer = f"{answer} {paragraph}".strip()
    return answer if len(answer) >= 24 else ""


if __name__ == "__main__":
    print(main(Path(sys.argv[1])), "pairs")
