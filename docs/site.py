"""What `mkdocs` is told besides `mkdocs.yml`: which files of the repository are pages, too.

Links lead from file to file, as the repository has them, and are turned into the site's.
"""

import re
import shutil
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {  # where the site has them, beside the files of this folder
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "ras/bundled/README.md": "bundled.md",
    "ras_kernels/README.md": "kernels.md",
}
SOURCES = {uri: path for path, uri in PAGES.items()}


def on_files(files, config):
    globs = "benchmarks/results/*/*.png", "examples/*.py", "examples/*.ipynb"
    files_too = [path.relative_to(ROOT).as_posix() for each in globs for path in ROOT.glob(each)]
    for path, uri in [*PAGES.items(), *zip(files_too, files_too)]:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    here = (ROOT / SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def turned(link):
        file = (here / link[1]).resolve().relative_to(ROOT).as_posix()
        return f"]({PAGES.get(file, file.removeprefix('docs/'))}"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)", turned, markdown)


def on_post_build(config, **_):
    """The pages as they are written lie beside the site, for `llms.txt` to lead to."""
    for path in [*ROOT.glob("docs/*.md"), *map(ROOT.joinpath, PAGES)]:
        name = PAGES.get(path.relative_to(ROOT).as_posix(), path.name)
        shutil.copy(path, Path(config.site_dir, name))
