"""Checks what neither `nbdev-test` nor `pytest` sees: that modules, README, links and documentation pages follow from
the notebooks. `python tools/check_docs.py` reports; with `--write` it first mends whatever can be derived."""
import os, re, shutil, subprocess, sys, tomllib, warnings
from configparser import ConfigParser
from pathlib import Path

from fastcore.nbio import read_nb
from fastcore.script import call_parse
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parents[1]
max_kb = 400  # of a notebook: beyond that it is slow to open, to compare and to load as a page
text_suffixes = {'.cff', '.ini', '.ipynb', '.md', '.py', '.svg', '.toml', '.yml'}

def git(*args): return subprocess.run(['git', *args], check=True, capture_output=True, text=True).stdout

def project_files():
    "All files of the project, committed or about to be"
    names = git('ls-files', '-z', '--cached', '--others', '--exclude-standard').split('\0')
    return [p for name in dict.fromkeys(names) if name and (p := Path(name)).is_file()]

def notebooks(): return [p for p in project_files() if p.suffix == '.ipynb']

# --- The slug: written once, in settings.ini -------------------------------------------------------------------------

def settings():
    cfg = ConfigParser()
    cfg.read('settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def addresses(slug):
    "The forms that the slug `user/repo` takes in links: repository, Colab, pages"
    user, repo = slug.split('/')
    return [f'github.com/{slug}', f'/github/{slug}/', f'{user}.github.io/{repo}']

def slug_problems(write):
    "Files that still spell the slug or the description that `settings.ini` had before (`pyproject.toml` remembers it)"
    cfg, was = settings(), tomllib.loads(Path('pyproject.toml').read_text(encoding='utf-8'))['project']
    old, new = was['urls']['Repository'].removeprefix('https://github.com/'), f"{cfg['user']}/{cfg['repo']}"
    changes = [*zip(addresses(old), addresses(new)),
               (f'description = "{was["description"]}"', f'description = "{cfg["description"]}"')]
    for p in project_files():
        if p.suffix not in text_suffixes: continue
        mended = text = p.read_text(encoding='utf-8')
        for a, b in changes: mended = mended.replace(a, b)
        if mended == text: continue
        if write: p.write_text(mended, encoding='utf-8')
        else: yield f'{p}: not the slug or the description of settings.ini'

def badge_problems():
    "A chapter's Colab badge must open that chapter, of this repository"
    cfg = settings()
    for p in notebooks():
        want = f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/main/{p.as_posix()}"
        found = re.findall(r'https://colab\.research\.google\.com/github/[^)\s"\\]+', p.read_text(encoding='utf-8'))
        if set(found) != {want}: yield f'{p}: its Colab badge must lead to {want}, found {found or "none"}'

# --- README.md: the index notebook, as GitHub can show it ------------------------------------------------------------

def fence(text, lang): return f'```{lang}\n{text.rstrip()}\n```'

def rebase(text, folder):
    "Links relative to `folder` made relative to the repository's root"
    def _f(m): return m[1] + os.path.normpath(Path(folder)/m[2])
    return re.sub(r'(\]\()(?![a-z]+:|#)([^)\s]+)', _f, text)

def output_md(o, cell):
    "One saved output as Markdown; a README holds no figure, so such a cell must be hidden or link to an image file"
    if o.output_type == 'stream': return fence(''.join(o.text), 'text')
    data = o.get('data', {})
    if o.output_type == 'error' or any(k.startswith('image/') for k in data): raise ValueError(f'README: cannot show the output of cell {cell.id}')
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    return fence(''.join(data['text/plain']), 'text')

def cell_md(cell, folder):
    "The Markdown of one cell: its text, or its code and its saved outputs; '' for what readers do not see"
    if cell.cell_type == 'markdown': return rebase(cell.source.strip(), folder)
    directives = re.findall(r'^#\| *([\w-]+)', cell.source, flags=re.M)
    if cell.cell_type != 'code' or 'hide' in directives: return ''
    code = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip()
    return '\n\n'.join([fence(code, 'python')] * bool(code) + [output_md(o, cell) for o in cell.outputs])

def readme_text(nb_path=Path('nbs/index.ipynb')):
    note = f'<!-- Written from {nb_path.as_posix()} by tools/check_docs.py: edit the notebook. -->'
    cells = [cell_md(c, nb_path.parent) for c in read_nb(nb_path).cells]
    return '\n\n'.join([note, *filter(None, cells)]) + '\n'

def readme_problems(write):
    "README.md differs from the index notebook, or links to a file that is not there"
    readme, text = Path('README.md'), readme_text()
    if write: readme.write_text(text, encoding='utf-8')
    elif not readme.is_file() or readme.read_text(encoding='utf-8') != text: yield 'README.md: not what nbs/index.ipynb says; run tools/check_docs.py --write'
    for target in re.findall(r'\]\((?![a-z]+:|#)([^)\s#]+)', text):
        if not Path(target).exists(): yield f'README.md: links to {target}, which does not exist'

# --- Notebooks, modules, pages ---------------------------------------------------------------------------------------

def hygiene_problems():
    "Merge markers pass every test, and fat notebooks and warnings of the machine that ran them do, too"
    marker = re.compile(r'^[\s"`]*(?:<{7}|>{7})(?:[\s"\\`]|$)', re.M)
    for p in project_files():
        if p.suffix in ('.ipynb', '.py') and marker.search(p.read_text(encoding='utf-8')): yield f'{p}: a merge marker'
    for p in notebooks():
        if (kb := p.stat().st_size/1000) > max_kb: yield f'{p}: {kb:.0f} kB, the limit is {max_kb}'
        if any(o.get('name') == 'stderr' for c in read_nb(p).cells for o in c.get('outputs', [])): yield f'{p}: a warning among the saved outputs'

def step_problems(write):
    "`nbdev-export` and `nbdev-clean` must leave a fresh checkout as it is: new files count, so `git diff` will not do"
    nbdev_export.__wrapped__()
    nbdev_clean.__wrapped__()
    changed = git('status', '--porcelain')
    if changed and not write: yield f'after nbdev-export and nbdev-clean the checkout differs from its commit:\n{changed}'

def page_problems():
    "What stops the documentation build short of Quarto: `show_doc` runs for every page here"
    shutil.rmtree('_proc', ignore_errors=True)
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    try:
        with warnings.catch_warnings():  # the build would run the other code of such a cell too
            warnings.filterwarnings('error', message='Found cells containing imports')
            pages = proc_nbs(n_workers=0)
    except Exception as e: return (yield f'documentation: {e}')
    for p in notebooks():
        page = pages/p.relative_to('nbs')
        if not page.is_file(): yield f'{p}: gives no page'
        elif any(o.output_type == 'error' for c in read_nb(page).cells for o in c.get('outputs', [])): yield f'{p}: its page shows an error'

@call_parse
def main(write:bool=False): # Mend modules, notebooks, README and links first; and leave uncommitted changes unmentioned
    "Check that modules, README, links and documentation pages follow from the notebooks"
    os.chdir(root)
    sys.path.insert(0, str(root))  # the pages must run this checkout's drdna, whatever is installed
    problems = [*slug_problems(write), *badge_problems(), *hygiene_problems(), *step_problems(write), *readme_problems(write), *page_problems()]
    if problems: sys.exit('\n'.join(problems))
    print(f'{len(notebooks())} notebooks: modules, README, links and pages agree')
