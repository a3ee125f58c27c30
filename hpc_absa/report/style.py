"""The report page's style sheet; the figures' colours come from the same palette."""

from __future__ import annotations

from hpc_absa.report.palette import DARK, LIGHT, Theme


def style_sheet() -> str:
    """CSS for both appearances; nothing in it is loaded from elsewhere."""
    return f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n" + (
        f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n{_RULES}"
    )


def _variables(theme: Theme) -> str:
    return (
        f"--paper: {theme.paper}; --ink: {theme.ink}; --soft: {theme.soft}; --grid: {theme.grid};"
        f" --band: {theme.band}; --alarm: {theme.alarm}; --mark: {theme.mark};"
    )


_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--grid); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; overflow-wrap: anywhere; }
.sub { color: var(--soft); margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; }
.tile { background: var(--band); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 650; }
.tile span { color: var(--soft); font-size: .85rem; }
.notice { border-left: .25rem solid var(--alarm); background: var(--band); margin: 1.2rem 0 0;
  padding: .6rem .9rem; border-radius: 0 .4rem .4rem 0; }
.notice p { margin: .15rem 0; }
picture, picture img { display: block; width: 100%; height: auto; }
picture { margin: 0 0 1.2rem; }
figure { margin: 0 0 1rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-bottom: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .32rem .6rem; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; vertical-align: bottom; }
.groups th { text-align: center; border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.why { min-width: 17rem; }
tr.grow td { background: color-mix(in srgb, var(--mark) 11%, transparent); }
tr.sum td { font-weight: 650; border-bottom: 0; }
.note { color: var(--soft); font-size: .85rem; margin: .4rem 0 0; }
pre { background: var(--band); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto;
  font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { .tile, pre, .notice { border: 1px solid var(--grid); } }
"""
