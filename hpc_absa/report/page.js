/* The curves of the page, drawn with BokehJS from the JSON in #curves (curves.py). No text of the
   user's is ever used as HTML. live.js comes before. */
"use strict";
(() => {
  const { $, $$, element } = live;
  const DASHES = [[], [7, 3], [2, 2], [9, 3, 2, 3], [4, 2]];
  const COLOURS = 7, READOUT_LINES = 12, GRID = 200, PRINTED = 320;
  const hidden = new Set();  // keys of curves that the reader switched off
  const read = (root) => JSON.parse($("#curves", root).textContent);
  let data = read(document);
  let plots = [];  // {key, panel, figure, view, element, lines: [{curve, xs, ys}], update}
  let range, extent = [0, 1], axis, generation = 0;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const number = (value, digits = 4) => {
    if (!Number.isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(2);
    return String(Number(value.toPrecision(digits)));
  };

  // What is drawn: each run, or the mean of the runs that differ in their seed only

  const grouped = () => $("#mean")?.checked ?? false;
  function curves() {
    const runs = data.runs.map((run, i) => ({ key: run.name, name: run.name, runs: [run], i }));
    if (!grouped()) return runs;
    const groups = new Map();
    for (const run of data.runs) groups.set(run.group, [...(groups.get(run.group) ?? []), run]);
    return [...groups].map(([name, runs], i) => ({ key: `group ${name}`, name, runs, i }));
  }
  const look = (i) => ({
    colour: css(`--run${i % COLOURS}`), dash: DASHES[Math.floor(i / COLOURS + i) % DASHES.length],
  });

  function points(run, [indices, values], log) {
    const at = run.x[axis.key], xs = [], ys = [];
    indices.forEach((index, n) => {
      const x = at[index], y = values[n];
      if (x !== null && y !== null && !(log && y <= 0)) { xs.push(x / axis.unit); ys.push(y); }
    });
    return { xs, ys };
  }
  function stepped({ xs, ys }, end) {
    const result = { xs: [], ys: [] };
    xs.forEach((x, i) => {
      if (i) { result.xs.push(x); result.ys.push(ys[i - 1]); }
      result.xs.push(x); result.ys.push(ys[i]);
    });
    if (xs.length && end > xs.at(-1)) { result.xs.push(end); result.ys.push(ys.at(-1)); }
    return result;
  }
  const last = (run) => Math.max(...run.x[axis.key].filter((x) => x !== null), 0) / axis.unit;

  function interpolate({ xs, ys }, x, steps) {
    if (!xs.length || x < xs[0] || x > xs.at(-1)) return NaN;
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    if (x >= xs[high]) return ys[high];
    if (steps || xs[high] === xs[low]) return ys[low];
    return ys[low] + (ys[high] - ys[low]) * (x - xs[low]) / (xs[high] - xs[low]);
  }
  function meanOf(all, steps) {  // with the standard deviation, where at least two runs are
    const begin = Math.min(...all.map((c) => c.xs[0])), end = Math.max(...all.map((c) => c.xs.at(-1)));
    const result = { xs: [], ys: [], low: [], high: [] };
    for (let n = 0; n <= GRID; n++) {
      const x = begin + (end - begin) * n / GRID;
      const values = all.map((c) => interpolate(c, x, steps)).filter(Number.isFinite);
      if (!values.length) continue;
      const mean = values.reduce((a, b) => a + b, 0) / values.length;
      const square = values.reduce((a, b) => a + (b - mean) ** 2, 0);
      const spread = values.length > 1 ? Math.sqrt(square / (values.length - 1)) : 0;
      result.xs.push(x); result.ys.push(mean);
      result.low.push(mean - spread); result.high.push(mean + spread);
    }
    return result;
  }

  function linesOf(panel, log) {
    const lines = [];
    for (const curve of curves().filter((c) => !hidden.has(c.key))) {
      Object.entries(panel.fields).forEach(([field, title], n) => {
        const own = curve.runs.filter((run) => run.y[field]);
        let all = own.map((run) => points(run, run.y[field], log)).filter((c) => c.xs.length);
        if (!all.length) return;
        if (panel.steps) all = all.map((c, i) => stepped(c, last(own[i])));
        const drawn = curve.runs.length > 1 ? meanOf(all, panel.steps) : all[0];
        lines.push({ curve, field, title, n, ...drawn, ...look(curve.i) });
      });
    }
    return lines;
  }

  // Drawing

  function chooseAxis() {
    const key = $("#axis").value;
    axis = { key, unit: 1, title: data.axes[key] };
    const longest = Math.max(...data.runs.map(last), 0);
    if (key === "seconds") {
      const [title, unit] = longest > 3 * 3600 ? ["hours", 3600] : longest > 600 ? ["minutes", 60]
        : ["seconds", 1];
      axis = { key, unit, title };
    }
    extent = [0, (longest || 1) / axis.unit];
  }

  // Bokeh's own formatter writes powers, and its ticker leaves whole decades without a label

  let PlainFormatter, DecadeTicker;
  function defineTicks() {
    PlainFormatter = class extends Bokeh.BasicTickFormatter {
      doFormat(ticks) { return ticks.map((tick) => number(tick, 6)); }
    };
    DecadeTicker = class extends Bokeh.BasicTicker {
      get_ticks_no_defaults(low, high, cross, count) {
        const minor = [], major = [], decades = Math.log10(high / low);
        if (!(decades > 0.7)) return super.get_ticks_no_defaults(low, high, cross, count);
        const parts = decades > 2.5 ? [1] : decades > 1.3 ? [1, 3] : [1, 2, 5];
        const skip = Math.max(1, Math.ceil(decades / 6));
        for (let n = Math.floor(Math.log10(low)); n <= Math.log10(high); n += 1) {
          if (n % skip === 0) major.push(...parts.map((part) => Number(`${part}e${n}`)));
        }
        return { major: major.filter((tick) => tick >= low && tick <= high), minor };
      }
    };
  }

  function style(figure) {
    const soft = css("--text-soft"), grid = css("--grid");
    Object.assign(figure, {
      background_fill_color: null, border_fill_color: null, outline_line_color: null,
      min_border_left: 58, min_border_right: 10,
    });
    figure.toolbar.logo = null;
    for (const own of figure.axes) {
      Object.assign(own, {
        axis_line_color: soft, major_tick_line_color: soft, minor_tick_line_color: null,
        major_label_text_color: soft, axis_label_text_color: soft, axis_label_text_font_style: "normal",
        axis_label_standoff: 2, major_tick_in: 0, major_tick_out: 4, axis_label_text_font_size: "12px",
      });
    }
    for (const own of figure.grids) own.grid_line_color = grid;
  }

  function makePlot(key, panel, host) {
    const chosen = $("#scale").value;
    const log = chosen === "auto" ? panel.scale !== "linear" : chosen === "log";
    if (!data.runs.some((run) => Object.keys(panel.fields).some((field) => run.y[field]))) return null;
    const figure = new Bokeh.Plotting.figure({
      height: 210, sizing_mode: "stretch_width", x_range: range, toolbar_location: null,
      y_axis_type: log ? "log" : "linear", x_axis_label: axis.title,
      y_range: new Bokeh.DataRange1d({ range_padding: 0.08, default_span: log ? 1 : 2 }),
      tools: [new Bokeh.BoxZoomTool(), new Bokeh.WheelZoomTool({ dimensions: "width" })],
    });
    figure.toolbar.active_drag = matchMedia("(pointer: coarse)").matches ? null : figure.toolbar.tools[0];
    figure.toolbar.active_scroll = null;
    style(figure);
    figure.xgrid.grid_line_color = null;
    figure.yaxis.formatter = new PlainFormatter();
    const ticker = log
      ? panel.scale === "log2" ? new Bokeh.LogTicker({ base: 2, num_minor_ticks: 0, desired_num_ticks: 5 })
        : new DecadeTicker({ desired_num_ticks: 5, num_minor_ticks: 0 })
      : new Bokeh.BasicTicker({ desired_num_ticks: 5, num_minor_ticks: 0 });
    figure.yaxis.ticker = figure.ygrid.ticker = ticker;
    const source = (columns) => new Bokeh.ColumnDataSource(
      { data: Object.fromEntries(columns.map((name) => [name, []])) });
    const band = source(["xs", "ys", "colour"]), line = source(["xs", "ys", "colour", "dash", "width"]);
    const dots = source(["x", "y", "colour", "marker", "size", "fill"]);
    const threshold = source(["x", "y"]);
    if (data.runs.length === 1) shade(figure, data.runs[0]);
    figure.patches({ field: "xs" }, { field: "ys" },
      { source: band, fill_color: { field: "colour" }, fill_alpha: 0.18, line_color: null });
    figure.line({ field: "x" }, { field: "y" }, {
      source: threshold, line_color: css("--text-soft"), line_dash: [5, 3], line_width: 1.2,
    });
    figure.multi_line({ field: "xs" }, { field: "ys" }, {
      source: line, line_color: { field: "colour" }, line_dash: { field: "dash" },
      line_width: { field: "width" }, line_join: "round",
    });
    figure.scatter({ field: "x" }, { field: "y" }, {
      source: dots, marker: { field: "marker" }, size: { field: "size" },
      line_color: { field: "colour" }, fill_color: { field: "fill" }, line_width: 1.3,
    });
    const plot = { key, panel, figure, host, lines: [] };
    plot.update = () => {
      plot.lines = linesOf(panel, log);
      const lines = plot.lines, banded = lines.filter((c) => c.low);
      band.data = {
        xs: banded.map((c) => [...c.xs, ...c.xs.toReversed()]),
        ys: banded.map((c) => [...c.high, ...c.low.toReversed()].map((y) => log ? Math.max(y, 1e-12) : y)),
        colour: banded.map((c) => c.colour),
      };
      line.data = {
        xs: lines.map((c) => c.xs), ys: lines.map((c) => c.ys), colour: lines.map((c) => c.colour),
        dash: lines.map((c) => c.n ? DASHES[2] : c.dash), width: lines.map((c) => c.n ? 1.3 : 1.8),
      };
      dots.data = marks(plot, log);
      threshold.data = key === "eigenvalue" && data.runs.length === 1 && !hidden.has(data.runs[0].name)
        ? stepsBefore(points(data.runs[0], data.runs[0].threshold, log)) : { x: [], y: [] };
      describe(plot);
    };
    plot.update();
    return plot;
  }
  function stepsBefore({ xs, ys }) {  // a value is the one since the previous point
    const steps = { x: [], y: [] };
    xs.forEach((x, i) => {
      if (i) { steps.x.push(xs[i - 1]); steps.y.push(ys[i]); }
      steps.x.push(x); steps.y.push(ys[i]);
    });
    return steps;
  }

  function shade(figure, run) {  // every other phase, and failures
    const at = (index) => run.x[axis.key][index] / axis.unit;
    run.phases.forEach((index, n) => {
      if (n % 2 === 0) return;
      const end = n + 1 < run.phases.length ? at(run.phases[n + 1]) : last(run);
      figure.add_layout(new Bokeh.BoxAnnotation({
        left: at(index), right: end, fill_color: css("--band"), fill_alpha: 1, line_color: null,
        level: "image",
      }));
    });
    for (const index of run.failures) {
      figure.add_layout(new Bokeh.Span({
        location: at(index), dimension: "height", line_color: css("--failure"), line_dash: [3, 3],
        line_width: 1.3,
      }));
    }
  }

  const MARKS = {
    grow: ["triangle", 10, true], bound: ["circle", 6, false], unconverged: ["diamond", 7, false],
    estimate: ["circle", 5, true],
  };
  function marks(plot, log) {
    const dots = { x: [], y: [], colour: [], marker: [], size: [], fill: [] };
    const add = (x, y, colour, [marker, size, full]) => {
      dots.x.push(x); dots.y.push(y); dots.colour.push(colour); dots.marker.push(marker);
      dots.size.push(size); dots.fill.push(full ? colour : css("--background"));
    };
    for (const line of plot.lines) {
      if (plot.key !== "eigenvalue") {
        if (line.xs.length > 60 || plot.panel.steps || line.low) continue;
        line.xs.forEach((x, i) => add(x, line.ys[i], line.colour, line.n ? MARKS.bound : MARKS.estimate));
      } else if (!line.low) {
        const run = line.curve.runs[0], [indices, values] = run.y.eigenvalue;
        for (const [name, rows] of Object.entries(run.marks)) {
          const own = rows.filter((row) => indices.includes(row));
          const some = [own, own.map((row) => values[indices.indexOf(row)])];
          const { xs, ys } = points(run, some, log);
          const colour = name === "grow" && data.runs.length === 1 ? css("--growth") : line.colour;
          xs.forEach((x, i) => add(x, ys[i], colour, MARKS[name]));
        }
      }
    }
    return dots;
  }

  function describe(plot) {  // the text alternative
    const some = plot.lines.slice(0, 6).map((c) => {
      const name = data.runs.length > 1 ? `${c.curve.name}, ${c.title}` : c.title;
      const ends = `${number(c.ys[0])} at first, ${number(c.ys.at(-1))} at last`;
      return `${name}: ${ends}, between ${number(Math.min(...c.ys))} and ${number(Math.max(...c.ys))}`;
    });
    const more = plot.lines.length > 6 ? `; and ${plot.lines.length - 6} more curves` : "";
    plot.host.setAttribute("aria-label", `${plot.panel.title} over ${axis.title}. ${some.join("; ")}${more}`);
  }

  async function build() {
    const own = ++generation;
    chooseAxis();
    range = new Bokeh.Range1d({ start: extent[0], end: extent[1] });
    const panels = $("#panels"), made = [], figures = [];
    const begin = performance.now();
    for (const [key, panel] of Object.entries(data.panels)) {
      const host = element("div", { class: "plot", role: "img" });
      const plot = makePlot(key, panel, host);
      if (!plot) continue;
      const caption = element("figcaption", {}, panel.title);
      const names = Object.values(panel.fields);
      if (names.length > 1) caption.append(element("span", { class: "key" }, `— ${names[0]}  ┄◦ ${names[1]}`));
      if (key === "eigenvalue") caption.append(element("span", { class: "key" }, eigenvalueKey()));
      figures.push(element("figure", { class: "panel", "data-panel": key }, caption, host));
      made.push(plot);
    }
    const document_ = new Bokeh.Document();
    for (const plot of made) document_.add_root(plot.figure);
    const old = plots;
    plots = [];
    for (const plot of old) plot.view?.remove();
    panels.replaceChildren(...figures);
    const views = await Bokeh.embed.add_document_standalone(document_, panels, made.map((p) => p.host));
    if (own !== generation) return;
    for (const plot of made) {
      plot.view = views.get(plot.figure);
      plot.figure.on_event("mousemove", (event) => readout(plot, event));
      plot.figure.on_event("mouseleave", () => readout(null));
      plot.figure.on_event("doubletap", reset);
    }
    plots = made;
    panels.dataset.drawn = String(Math.round(performance.now() - begin));
  }
  function eigenvalueKey() {
    const single = data.runs.length === 1;
    return `▲ grows  ○ at least${single ? "  ┄ threshold" : ""}`;
  }
  function update() {
    for (const plot of plots) plot.update();
  }
  function reset() {
    range.setv({ start: extent[0], end: extent[1] });
    for (const plot of plots) plot.figure.y_range.reset();
  }

  // The values at the pointer, and a line at the same place in all panels

  function readout(plot, event) {
    const box = $("#readout");
    for (const other of plots) other.cursor?.remove();
    box.hidden = true;
    if (!plot || !plot.lines.length) return;
    const nearest = plot.lines.map((line) => {
      const i = closest(line.xs, event.x);
      return { line, x: line.xs[i], y: line.ys[i], away: Math.abs(line.xs[i] - event.x) };
    });
    const x = nearest.reduce((a, b) => (b.away < a.away ? b : a)).x;
    const values = nearest
      .map(({ line }) => ({ line, y: interpolate(line, x, plot.panel.steps) }))
      .filter(({ y }) => Number.isFinite(y))
      .sort((a, b) => Math.abs(a.y - event.y) - Math.abs(b.y - event.y))
      .slice(0, READOUT_LINES).sort((a, b) => b.y - a.y);
    if (!values.length) return;
    box.replaceChildren(element("b", {}, `${axis.title} ${number(x, 6)}`));
    for (const { line, y } of values) {
      const several = data.runs.length > 1 ? `${line.curve.name} ` : "";
      const swatch = element("i", { style: `background:${line.colour}` });
      box.append(element("span", {}, swatch, `${several}${line.title}`), element("span", {}, number(y, 5)));
    }
    box.hidden = false;
    const host = plot.host.getBoundingClientRect(), width = box.offsetWidth;
    const left = host.left + event.sx + 16;
    box.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 8)) + scrollX}px`;
    box.style.top = `${host.top + scrollY + 8 - box.offsetHeight - 14}px`;
    for (const other of plots) {
      const frame = other.view.frame, at = frame.x_scale.compute(x);
      if (x < range.start || x > range.end) continue;
      other.cursor = element("div", { class: "cursor" });
      Object.assign(other.cursor.style, {
        left: `${at}px`, top: `${frame.bbox.top}px`, height: `${frame.bbox.height}px`,
      });
      other.host.append(other.cursor);
    }
  }
  function closest(xs, x) {
    let best = 0;
    xs.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = i; });
    return best;
  }

  // Legend, controls

  function legend() {
    const drawn = curves();
    $("#legend").replaceChildren(...(data.runs.length < 2 ? [] : drawn.map((curve) => {
      const { colour, dash } = look(curve.i);
      const swatch = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      swatch.setAttribute("viewBox", "0 0 26 8");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      for (const [name, value] of Object.entries({
        d: "M0 4H26", stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash.join(" "),
      })) path.setAttribute(name, value);
      swatch.append(path);
      const count = curve.runs.length > 1 ? ` (${curve.runs.length} runs)` : "";
      const button = element("button", { type: "button", "aria-pressed": !hidden.has(curve.key) },
        swatch, `${curve.name}${count}`);
      button.addEventListener("click", () => {
        if (!hidden.delete(curve.key)) hidden.add(curve.key);
        button.setAttribute("aria-pressed", !hidden.has(curve.key));
        update();
      });
      return button;
    })));
  }
  function start() {
    defineTicks();
    const seeds = new Set(data.runs.map((run) => run.group)).size < data.runs.length;
    $("#mean").checked = seeds;
    $("#mean").parentElement.hidden = !seeds;
    for (const id of ["axis", "scale"]) $(`#${id}`).addEventListener("change", build);
    $("#mean").addEventListener("change", () => { legend(); update(); });
    $("#reset").addEventListener("click", reset);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { legend(); build(); });
    addEventListener("beforeprint", () => fitToPaper(PRINTED));
    addEventListener("afterprint", () => fitToPaper(0));
    legend();
    build();
  }
  function fitToPaper(width) {  // a canvas keeps its size, and two must fit beside each other
    for (const { host } of plots) host.style.zoom = width ? Math.min(1, width / host.offsetWidth) : "";
  }

  // Curves of a page that was asked for again

  live.refresh = (page) => {
    const fresh = read(page);
    const shape = (content) => JSON.stringify([
      Object.entries(content.panels).map(([key, panel]) => [key, panel.scale]),
      content.runs.map((run) => [run.name, run.phases.length, run.failures.length, Object.keys(run.y)]),
    ]);
    const whole = range && range.start === extent[0] && range.end === extent[1];
    const same = shape(fresh) === shape(data);
    data = fresh;
    if (!same) { legend(); build(); return; }
    const unit = axis.unit;
    chooseAxis();
    if (axis.unit !== unit) { build(); return; }
    update();
    if (whole) range.setv({ start: extent[0], end: extent[1] });
  };

  async function inflate(script) {  // libraries in the page are compressed
    const bytes = Uint8Array.from(atob(script.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const code = document.createElement("script");
    code.textContent = await new Response(stream).text();
    document.head.append(code);
  }
  (async () => {
    for (const script of $$("script[type='application/gzip']")) await inflate(script);
    start();
  })();
})();
