"""Prints the one shell command that stands under a heading of README.md: `python3 tools/readme_command.py 'Run all the tests'`.

The CI runs what a newcomer would copy, so the README cannot drift from what works. It runs before anything is
installed: the standard library only."""
import re, sys
from pathlib import Path

def shell_blocks(text, heading):
    "The contents of the fenced `sh` blocks in the sections of `text` titled `heading`"
    sections = re.split(r'^#+ +(.+?) *$\n', text, flags=re.M)  # before, title, body, title, body, …
    bodies = [body for title, body in zip(sections[1::2], sections[2::2]) if title == heading]
    return [block for body in bodies for block in re.findall(r'^```sh\n(.*?)^```$', body, flags=re.M | re.S)]

if __name__ == '__main__':
    readme, heading = Path(__file__).parents[1]/'README.md', sys.argv[1]
    blocks = shell_blocks(readme.read_text(encoding='utf-8'), heading)
    if len(blocks) != 1: sys.exit(f'{readme}: {len(blocks)} shell blocks under "{heading}", exactly one is needed')
    print(blocks[0], end='')
