"""The README and the pages of docs/: their links, and the tables of tests/docs.py, which runs their commands."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')]


def anchors(page) -> set[str]:
    """What a page's headings are called in links."""
    headings = re.findall(r'^#+ (.+)$', re.sub(r'^```.*?^```$', '', page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r'[^\w -]', '', heading).lower().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_links_to_is_there(page):
    links = re.findall(r'\]\(([^)\s]+)\)', page.read_text())
    for link in (link for link in links if '://' not in link):
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_picture_is_shown():
    shown = {name for page in PAGES for name in re.findall(r'!\[[^]]*\]\((?:docs/)?([\w.]+)\)', page.read_text())}
    assert shown == {picture.name for picture in (ROOT / 'docs').glob('*.png')}


def test_the_commands_of_the_pages_are_those_that_docs_test_can_run():
    listed = subprocess.run([sys.executable, ROOT / 'tests' / 'docs.py', '--list'], capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    for command in ('python tools/train.py configs/xcit_spec_maskrcnn.py', 'spec-mmdet train xcit_spec_maskrcnn'):
        assert re.search(rf'^\S+ +(rm .* && )?{re.escape(command)} ', listed.stdout, re.M)


def test_every_module_has_its_place_on_the_page_about_the_structure():
    page = (ROOT / 'docs' / 'architecture.md').read_text()
    for path in (ROOT / 'spec_mmdet').glob('*/*.py'):
        if path.parent.name != 'commands' and path.name != '__init__.py':
            assert re.search(rf'`({path.parent.name}/)?{path.name}`', page), path
