"Carries the requirement lists of `settings.ini` into the package metadata; all else is in `pyproject.toml`."
from configparser import ConfigParser
from setuptools import setup

cfg = ConfigParser()
cfg.read('settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']

setup(
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('campaign', 'docs', 'dev')},
    keywords=cfg['keywords'].split(),
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        # Lets other nbdev projects link our backticked names to their page in our documentation.
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
)
