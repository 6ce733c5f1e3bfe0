"""The style sheet of the report."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1b1f24; --soft: #59636e; --rule: #d8dde3;
  --c0: #0b62b4; --c1: #c2500a; --c2: #0a7d5a; --c3: #a8447f; --c4: #8a6a00; --c5: #2b8ccf; --c6: #6b54c6;
  --c7: #59636e; }
@media (prefers-color-scheme: dark) { :root { --back: #0f1318; --card: #181d24; --text: #e6e9ed; --soft: #9aa5b1;
  --rule: #2f3740; --c0: #6cb2f5; --c1: #f5935a; --c2: #4fcf9f; --c3: #e38fc2; --c4: #e0b93f; --c5: #8fd0fb;
  --c6: #b0a0f7; --c7: #aab4bf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .85rem; color: var(--soft); }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg text.small { font-size: 10.5px; }
.pixels { image-rendering: pixelated; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.line.dashed { stroke-dasharray: 5 4; }
.key { overflow-wrap: anywhere; }
.key i { display: inline-block; width: 1.4em; height: 0; border-top: 3px solid; margin-right: .4em;
  vertical-align: .25em; }
.key i.dashed { border-top-style: dashed; }
.legend { align-items: center; }
.scale { flex: 1; height: .6rem; border-radius: .3rem; }
i.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: currentColor;
  margin-right: .4em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; min-width: min(100%, 46rem); }
dl { font-size: .9rem; margin: 0; }
dd { margin: 0 0 .75rem; color: var(--soft); overflow-wrap: anywhere; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-top: 1px solid var(--rule);
  overflow-wrap: break-word; }
tbody th { font-weight: 400; color: var(--soft); width: 12rem; min-width: 8rem; }
thead th, thead td { border-top: 0; }
footer { margin: 2rem 0 1rem; color: var(--soft); font-size: .85rem; }
""" + "".join(
    f".c{place} {{ color: var(--c{place}); stroke: var(--c{place}); }} circle.c{place} {{ fill: var(--c{place}); }}\n"
    for place in range(8)
)
