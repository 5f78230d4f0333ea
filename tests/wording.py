"""Check docstrings, messages and pages: their wording, and every link and anchor.

    python tests/wording.py

Run by `make lint`; needs no packages. The rules are those of docs/contributing/writing.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A docstring starts with an imperative verb, or with a noun phrase that names what is returned.
BAD_STARTS = {
    *['What', 'Whether', 'How', 'Have', 'Of', 'For', 'As', 'Where', 'Which', 'Who', 'Be', 'That', 'Those'],
    *['By', 'To', 'From', 'When', 'None', 'No', 'Nothing', 'It', 'Tell', 'Say'],
}

# Words for which the field has a standard term: a pattern and the term.
GLOSSARY = {
    r'images? a step|images per step': 'total batch size',
    r'images? a second': 'images per second',
    r'\b(is|are|was|were|it) not whole\b|\bnone of .{0,20}is whole': 'corrupt, truncated',
    r'written aside|\bwrites? aside': 'temporary file; written atomically',
    r'learn(t|ed) from': 'used for training',
    r'least score|score to ask for': 'score threshold',
    r'gradients? by (?!step|hand)': 'gradient with respect to',
    r'without windows': 'headless build',
    r"GPUs? of NVIDIA's": 'NVIDIA GPU',
    r'learns? .{0,30}by heart': 'overfits',
    r'to be put right|is to be taken|are to be taken': 'fix ...; use ...',
    r'\bis none (that|of|to)\b': 'cannot be ...; is invalid',
    r'another \w+ than\b': 'different from',
    r'in the place of': 'instead of',
    r'\bis there (already|twice)|\bare there twice': 'exists; occurs twice, duplicate',
    r'\bgo(es)? on from': 'resume from',
    r'\bnone that (is|are|can)\b|\bNone where': 'positive wording; None if',
    r'\bthe whole config\b': 'the complete config',
    r'\bpass(es)? over ': 'skip',
    r'\b(is|are) to be (put|taken|left|made|read|used|started)\b': 'a command: use, fix, start ...',
    r'\b[Tt]ell whether\b': 'return whether; check whether',
}
# Passages that need a word of the glossary: file and line text.
ALLOWED = {
    'tests/wording.py',
}


def list_files(*suffixes: str) -> list[Path]:
    """List the files that git tracks, by suffix."""
    names = subprocess.run(['git', '-C', ROOT, 'ls-files'], check=True, capture_output=True, text=True).stdout
    paths = (ROOT / name for name in names.splitlines() if name.endswith(suffixes) and name not in ALLOWED)
    return [path for path in paths if path.is_file()]


def check_python(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and fault of docstrings and strings in a Python file."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            line = node.body[0].lineno
            if (first := re.match(r'\w+', text)) and first[0] in BAD_STARTS:
                yield line, f'the docstring starts with "{first[0]}": use an imperative verb or name what is returned'
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for offset, fault in check_words(node.value):
                yield node.lineno + node.value.count('\n', 0, offset), fault


def check_words(text: str) -> Iterator[tuple[int, str]]:
    """Yield the offset and fault of each word that has a standard term."""
    for pattern, term in GLOSSARY.items():
        for match in re.finditer(pattern, text):
            yield match.start(), f'"{match[0]}": write "{term}"'


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    return re.sub(r'[^\w\- ]', '', text).replace(' ', '-')


def find_anchors(path: Path) -> set[str]:
    """Return the anchors of a Markdown page."""
    text = re.sub(r'^ *```.*?^ *```$', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r'^#+ (.+)$', text, re.MULTILINE)}


def check_page(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and fault of links, pictures and words in a Markdown page."""
    text = path.read_text(encoding='utf-8')
    prose = re.sub(r'^ *```.*?^ *```$', lambda m: '\n' * m[0].count('\n'), text, flags=re.MULTILINE | re.DOTALL)
    for offset, fault in check_words(prose):
        yield prose.count('\n', 0, offset) + 1, fault
    for match in re.finditer(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)', prose):
        picture, label, target = match.groups()
        line = prose.count('\n', 0, match.start()) + 1
        if picture and not label:
            yield line, f'the picture {target} has no alternative text'
        if re.match(r'https?:|mailto:', target):
            continue
        name, _, anchor = target.partition('#')
        page = (path.parent / name).resolve() if name else path
        if not page.exists():
            yield line, f'the link {target} leads nowhere'
        elif anchor and page.suffix == '.md' and anchor not in find_anchors(page):
            yield line, f'{page.name} has no heading #{anchor}'


def main() -> None:
    faults = []
    for suffix, check in {'.py': check_python, '.md': check_page}.items():
        for path in list_files(suffix):
            faults += [f'{path.relative_to(ROOT)}:{line}: {fault}' for line, fault in check(path)]
    print('\n'.join(faults))
    sys.exit(f'{len(faults)} faults of wording or links' if faults else 0)


if __name__ == '__main__':
    main()
