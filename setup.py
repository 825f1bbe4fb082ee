"Packaging for dit_sr_kit: every value comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def words(key):
    return cfg.get(key, "").split()


metrics = words("metrics_requirements")
lab = words("lab_requirements") + metrics
train = words("train_requirements")
text = words("text_requirements")
extras = {"lab": lab, "metrics": metrics, "text": text, "train": train,
          "dev": words("dev_requirements") + lab + text + train}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["dit_sr_kit", "dit_sr_kit.*"]),
    package_data={"dit_sr_kit": ["assets/*", "assets/*/*"]},
    install_requires=words("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": ["dit_sr_kit=dit_sr_kit._modidx:d"],
    },
    zip_safe=False,
)
