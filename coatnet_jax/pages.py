"""Report pages: one self-contained HTML file and its Markdown twin from the same sections.

The HTML holds its style and every picture inside itself, so that it can be sent or kept as one
file, and asks for nothing from the network. Results are also written as CSV and JSON from here.
"""

import base64
import csv
import html
import io
import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from input_pipeline.files import write_whole

Section = Mapping[str, Any]  # {'title': str, 'blocks': [block, …]}; blocks as in write_report

STYLE = """
:root { color-scheme: light dark; --ink: #1f2430; --muted: #5b6472; --line: #e1e4e8;
  --page: #fff; --soft: #f6f7f9; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ec; --muted: #a2aab6; --line: #343a44;
  --page: #16191f; --soft: #1f242c; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--accent); }
p { margin: .6rem 0; max-width: 46rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; background: var(--soft); }
td.number, th.number { text-align: right; white-space: nowrap; }
td:first-child { min-width: 7rem; }
figure { margin: 1.25rem 0; }
figure .scroll { margin: 0; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption, .note { color: var(--muted); font-size: .9rem; margin-top: .4rem; }
code, pre { font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
code { background: var(--soft); padding: .1em .3em; border-radius: 4px; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 8px; overflow-x: auto; }
pre code { padding: 0; background: none; }
summary { cursor: pointer; color: var(--accent); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }
.fact { background: var(--soft); border-left: 4px solid var(--accent); border-radius: 6px;
  padding: .8rem 1rem; display: flex; flex-direction: column; }
.fact strong { font-size: 1.7rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.fact .note { margin-top: .2rem; }
@media (max-width: 40rem) {
  body { padding: 1.25rem .9rem 3rem; font-size: 15px; }
  h1 { font-size: 1.4rem; } .facts { grid-template-columns: 1fr 1fr; gap: .6rem; }
  .fact { padding: .6rem .7rem; } .fact strong { font-size: 1.35rem; }
  th, td { padding: .32rem .55rem; }
  figure img.wide { max-width: none; width: 46rem; }
}
"""


def write_report(
    out_dir: str | Path, *, title: str, sections: Sequence[Section], name: str = "report"
) -> tuple[Path, Path]:
    """Write `<name>.html` and `<name>.md` under `out_dir`; give back both paths.

    A section is `{'title': …, 'blocks': […]}` and a block one of `{'text': paragraph}`,
    `{'table': [row dict, …], 'note': …}` (with a 'summary' it is folded), `{'figure': path,
    'caption': …, 'wide': True}`, `{'facts': [(value, what, note), …]}` (a few large figures side by
    side) and `{'code': lines, 'summary': …}` (with a summary it is folded). A wide figure keeps its
    size on a phone and scrolls; flat ones do so unasked. Texts know `code` and **bold**.
    Pictures are put into the HTML; the Markdown links to them relative to `out_dir`. A section
    without blocks is left out. Raises FileNotFoundError for a missing picture, ValueError for
    an unknown block.
    """
    out_dir = Path(out_dir)
    sections = [section for section in sections if section["blocks"]]
    pages = {"html": _html_page(title, sections), "md": _markdown_page(title, sections, out_dir)}
    out_dir.mkdir(parents=True, exist_ok=True)
    paths = [out_dir / f"{name}.{ending}" for ending in pages]
    for path, page in zip(paths, pages.values(), strict=True):
        path.write_text(page, encoding="utf-8")
    return paths[0], paths[1]


def cell(value: Any) -> str:
    """A value as a table shows it: '–' for None and NaN, digits to suit the size of the number."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}" if 0.1 <= abs(value) < 1e6 or value == 0 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(v) for v in value)
    return str(value)


def percent(share: float | None) -> str:
    """A share 0-1 as '53.9 %', unknown as '–'."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def share_range(interval: Sequence[float]) -> str:
    """Two shares 0-1 as '52.1–55.8 %'."""
    low, high = (100 * share for share in interval)
    return f"{low:.1f}–{high:.1f} %"


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """The mean and standard deviation (n - 1) of some values as '5.21 ± 0.34', one as '5.21'."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of rows with the same keys, padded so that it reads well as plain text."""
    if not rows:
        return ""
    names = list(rows[0])
    lines = [names, *([cell(row.get(n)).replace("|", "\\|") for n in names] for row in rows)]
    lines = [[" ".join(text.split()) for text in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    right = _number_columns(lines[1:])

    def joined(line):
        pads = [
            t.rjust(w) if r else t.ljust(w) for t, w, r in zip(line, widths, right, strict=True)
        ]
        return f"| {' | '.join(pads)} |"

    rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([joined(lines[0]), joined(rule), *map(joined, lines[1:])])


def _number_columns(lines: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold numbers, shares or ranges; never the first, which names the row."""
    number = re.compile(r"–|[-+]?[\d.,]+(–[\d.,]+| (to|±) [-+]?[\d.,]+)?( %)?")
    columns = list(zip(*lines, strict=True))
    return [i > 0 and all(number.fullmatch(t) for t in texts) for i, texts in enumerate(columns)]


# --- Markdown ------------------------------------------------------------------------------------


def _markdown_page(title: str, sections: Sequence[Section], folder: Path) -> str:
    parts = [f"# {title}"]
    for section in sections:
        parts.append(f"## {section['title']}")
        parts += [_markdown_block(block, folder) for block in section["blocks"]]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_block(block: Mapping[str, Any], folder: Path) -> str:
    if "text" in block:
        return block["text"]
    if "table" in block:
        summary = f"{block['summary']}:\n\n" if block.get("summary") else ""
        note = f"\n\n{block['note']}" if block.get("note") else ""
        return summary + markdown_table(block["table"]) + note
    if "facts" in block:
        return "\n".join(f"- **{value}** {what} ({note})" for value, what, note in block["facts"])
    if "figure" in block:
        link = quote(Path(os.path.relpath(block["figure"], folder)).as_posix())
        return f"![{block.get('caption', '')}]({link})"
    if "code" in block:
        summary = f"{block['summary']}:\n\n" if block.get("summary") else ""
        return f"{summary}```\n{block['code']}\n```"
    raise ValueError(
        f"unknown report block with keys {', '.join(block)}: use text, table, figure, facts, code"
    )


# --- HTML ----------------------------------------------------------------------------------------


def _html_page(title: str, sections: Sequence[Section]) -> str:
    parts = []
    for section in sections:
        blocks = "\n".join(_html_block(block) for block in section["blocks"])
        parts.append(f"<section>\n<h2>{html.escape(section['title'])}</h2>\n{blocks}\n</section>")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n{chr(10).join(parts)}\n</body>\n</html>\n"
    )


def _html_block(block: Mapping[str, Any]) -> str:
    if "text" in block:
        return f"<p>{_html_text(block['text'])}</p>"
    if "table" in block:
        note = f'<p class="note">{_html_text(block["note"])}</p>' if block.get("note") else ""
        table = _html_table(block["table"]) + note
        if not block.get("summary"):
            return table
        return f"<details><summary>{_html_text(block['summary'])}</summary>{table}</details>"
    if "facts" in block:
        return _html_facts(block["facts"])
    if "figure" in block:
        return _html_figure(
            Path(block["figure"]), block.get("caption", ""), wide=block.get("wide", False)
        )
    if "code" in block:
        code = f"<pre><code>{html.escape(block['code'])}</code></pre>"
        if not block.get("summary"):
            return code
        return f"<details><summary>{_html_text(block['summary'])}</summary>{code}</details>"
    raise ValueError(
        f"unknown report block with keys {', '.join(block)}: use text, table, figure, facts, code"
    )


def _html_text(text: str) -> str:
    text = html.escape(text)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


def _html_facts(facts: Sequence[tuple[str, str, str]]) -> str:
    cards = (
        f'<div class="fact"><strong>{html.escape(value)}</strong><span>{_html_text(what)}</span>'
        f'<span class="note">{_html_text(note)}</span></div>'
        for value, what, note in facts
    )
    return f'<div class="facts">{"".join(cards)}</div>'


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    body = [[cell(row.get(name)) for name in names] for row in rows]
    kinds = [' class="number"' if right else "" for right in _number_columns(body)]
    head = "".join(f"<th{k}>{html.escape(n)}</th>" for n, k in zip(names, kinds, strict=True))
    lines = [
        "<tr>"
        + "".join(f"<td{k}>{_html_text(t)}</td>" for t, k in zip(line, kinds, strict=True))
        + "</tr>"
        for line in body
    ]
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{chr(10).join(lines)}\n</tbody></table></div>"
    )


def _html_figure(path: Path, caption: str, *, wide: bool) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"picture {path} of the report is missing")
    kind, data, width, height = _picture(path)
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    # A wide picture would be unreadable at a phone's width: there it scrolls sideways.
    kept = ' class="wide"' if wide or width > 1.35 * height else ""
    note = f"<figcaption>{_html_text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll"><img{kept} src="{source}" width="{width}" height="{height}" '
        f'alt="{html.escape(caption, quote=True)}"></div>{note}</figure>'
    )


def _picture(path: Path) -> tuple[str, bytes, int, int]:
    """(kind, bytes, width, height); photos of more than a megabyte are packed as JPEG."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind, (width, height) = image.format.lower(), image.size
        if len(data) > 1_000_000:
            packed = io.BytesIO()
            image.convert("RGB").save(packed, "JPEG", quality=88)
            kind, data = "jpeg", packed.getvalue()
    return kind, data, width, height


# --- rows of results -----------------------------------------------------------------------------


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]], *, more: bool = False) -> Path:
    """Write rows with the same keys as CSV with a header; `more` adds them to those in the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if more else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if not more:
            writer.writeheader()
        writer.writerows(rows)
    return path


def write_json(path: str | Path, values: Mapping[str, Any]) -> Path:
    """Write plain values as JSON; NaN becomes null, because NaN is not JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_without_nan(values), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")
    return path


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
