# Copyright 2026 The trl-spin authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
What the site needs beyond MkDocs: what the pages link to outside of `docs/` becomes a part of it, with links that are
right both in the repository and on the site; and docstrings in TRL's format are turned into Markdown.
"""

import json
import os
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, InclusionLevel

import trl_spin


ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(?=[)#])")
# Pages beside those of `docs/`, and where they are in the repository. Other files that are linked to are shown as they are
PAGES = {"get_started.md": "README.md"}
PAGES |= {page: page for page in ("benchmarks/README.md", "benchmarks/evidence/README.md")}
PAGES["examples/self_play.md"] = "examples/self_play.ipynb"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".jinja": "jinja", "": "bash"}


def in_repository(page: str) -> str:
    """Path of a page's file in the repository."""
    return PAGES.get(page, f"docs/{page}")


def site_path(path: str) -> str:
    """Path on the site of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    pages = {repository: page for page, repository in PAGES.items()}
    return pages.get(path, path if path.endswith(".png") else f"source/{path}.md")


def target(page: str, link: str) -> str:
    """Path in the repository of what a page links to."""
    return os.path.normpath(os.path.join(os.path.dirname(in_repository(page)), link))


def notebook(path: Path) -> str:
    """A notebook as Markdown, with what its cells have printed and shown."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            if "image/png" in data:
                parts.append(f"![Figure](data:image/png;base64,{data['image/png'].strip()})")
            elif "<table>" in data.get("text/html", ""):
                parts.append(data["text/html"])
            else:
                text = "".join(output.get("text", [])) or data["text/plain"]
                parts.append("~~~text\n" + re.sub(r"\x1b\[[\d;]*m", "", text).strip() + "\n~~~")
    return "\n\n".join(parts).replace("\n~~~\n\n~~~text\n", "\n")  # what was printed, in one block


def on_files(files, config):
    for page, path in PAGES.items():
        source = {"content": notebook(ROOT / path)} if path.endswith(".ipynb") else {"abs_src_path": str(ROOT / path)}
        files.append(File.generated(config, page, **source))
    for page in [file.src_uri for file in files.documentation_pages()]:
        for link in LINK.findall((ROOT / in_repository(page)).read_text(encoding="utf-8")):
            path = target(page, link)
            if path.startswith("docs/") or files.get_file_from_path(site_path(path)):
                continue
            if path.endswith(".png"):
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
            elif (ROOT / path).is_file():
                text = (ROOT / path).read_text(encoding="utf-8")
                language = LANGUAGES.get(Path(path).suffix, "text")
                text = f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n~~~~{language}\n{text}\n~~~~\n"
                files.append(
                    File.generated(config, site_path(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
                )
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    start = os.path.dirname(uri)
    return LINK.sub(lambda link: os.path.relpath(site_path(target(uri, link[0])), start or "."), markdown)


def markdown_of(docstring: str) -> str:
    """A docstring in TRL's format as Markdown: parameters as a list, references as links where they lead to this page."""
    # There is one formula, and no renderer
    text = re.sub(r":\s+\$\$.+?\$\$", " ([The method and λ](method.md) has it).", docstring, flags=re.S)

    def link(reference):
        name = reference[1].rsplit(".", 1)[-1]
        return f"[`{name}`](#{name.lower()})" if name in trl_spin.__all__ else f"`{name}`"

    text = re.sub(r"\[`~?([\w.]+)`\](?!\()", link, text)
    lines, in_section = [], False
    for line in text.splitlines():
        if title := re.fullmatch(r"(Args|Parameters|Returns|Raises|Example):", line):
            in_section = title[1] != "Example"
            lines += [f"**{title[1].replace('Args', 'Parameters')}**", ""]
        elif line[:1].strip() or not in_section:  # prose
            in_section = in_section and not line
            lines.append(line.replace("[!NOTE]", "**Note**  "))
        elif group := re.fullmatch(r"    > (.+)", line):
            lines += ["", f"*{group[1]}*", ""]
        elif entry := re.fullmatch(r"    (\S[^(]*?)(?: \((.+)\))?:", line):
            lines.append(f"- **`{entry[1]}`**" + f" ({entry[2]})" * bool(entry[2]) + ":")
        else:
            lines.append(line[4:])
    return "\n".join(lines)


class TRLDocstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            obj.docstring.value = markdown_of(obj.docstring.value)
