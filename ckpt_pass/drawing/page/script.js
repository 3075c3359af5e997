"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const ROWS = 100, LISTED = 12, GRAPHS = 20;

  // Colours of Okabe and Ito, told apart with any colour vision; light and dark paper.
  const COLOURS = {
    "output": ["#5b6670", "#aab4be"],
    "gradient": ["#cc79a7", "#cc79a7"],
    "saved": ["#0072b2", "#3d9bdc"],
    "offloaded": ["#009e73", "#12b887"],
    "recomputed": ["#d55e00", "#ef7d2a"],
    "passing": ["#8ecdf2", "#9fd6f7"],
    "backward": ["#e69f00", "#e8b13a"],
    "workspace": ["#8a6d3b", "#b5945c"],
    "random state": ["#7a4fa3", "#b08ad6"],
    "others": ["#9aa5b1", "#6c7680"],
    "unused": ["#9aa5b1", "#8a95a1"],
  };
  const WORDS = {
    "output": "outputs", "gradient": "gradients", "saved": "saved", "offloaded": "offloaded",
    "recomputed": "recomputed", "passing": "passing (forward)", "backward": "passing (backward)",
    "workspace": "workspaces", "random state": "random states", "others": "beside this step",
  };
  const colour = (kind) => (COLOURS[kind] || COLOURS.others)[dark.matches ? 1 : 0];
  const look = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    return { ink: of("--ink"), soft: of("--soft"), paper: of("--paper"), panel: of("--panel"),
      line: of("--line"), accent: of("--accent"), warn: of("--warn") };
  };

  // --- words -----------------------------------------------------------------------------
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
  const unitOf = (nbytes) => {
    let power = 0;
    while (power < 4 && nbytes >= 1024 ** (power + 1)) power += 1;
    return power;
  };
  const inUnit = (nbytes, power) => {
    const value = nbytes / 1024 ** power;
    return power ? value.toFixed(value < 100 ? 2 : 1) : value.toFixed(0);
  };
  const bytes = (nbytes) => {
    const power = unitOf(Math.abs(nbytes));
    return `${inUnit(nbytes, power)} ${UNITS[power]}`;
  };
  const time = (ns) => ns >= 1e9 ? `${(ns / 1e9).toFixed(2)} s` : ns >= 1e6 ? `${(ns / 1e6).toFixed(2)} ms`
    : `${(ns / 1e3).toFixed(1)} µs`;
  const most = (row) => row.reduce((found, one) => Math.max(found, one), 0);
  const count = (n) => n.toLocaleString("en-US");
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  // --- elements --------------------------------------------------------------------------
  const element = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    if (options.class) made.className = options.class;
    if (options.text !== undefined) made.textContent = options.text;
    if (options.title) made.title = options.title;
    made.append(...children);
    return made;
  };
  const swatch = (kind, style = "") => {
    const made = element("span", { class: `swatch ${style}` });
    made.style.background = colour(kind);
    return made;
  };
  const cell = (text, name = "") => element("td", { class: name, text });
  const option = (value, text) => {
    const made = element("option", { text });
    made.value = value;
    return made;
  };
  const cut = (text, length) => text.length > length ? `${text.slice(0, length - 1)}…` : text;

  // --- plots -----------------------------------------------------------------------------
  const CONFIG = { displaylogo: false, responsive: true, displayModeBar: false, doubleClick: "reset" };
  const layout = (more) => {
    const c = look();
    const axis = { gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, tickcolor: c.line,
      automargin: true };
    const merged = {
      autosize: true,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: c.soft },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      margin: { l: 56, r: 14, t: 26, b: 44 }, dragmode: narrow.matches ? false : "zoom",
      hoverlabel: { bgcolor: c.panel, bordercolor: c.line, font: { color: c.ink }, align: "left" },
      ...more,
    };
    merged.xaxis = { ...axis, ...more.xaxis };
    merged.yaxis = { ...axis, ...more.yaxis };
    return merged;
  };

  // --- facts and account -----------------------------------------------------------------
  const showFacts = () => {
    for (const [name, words] of data.facts) {
      $("facts").append(element("dt", { text: name }), element("dd", { text: words }));
    }
    for (const words of data.warnings) $("warnings").append(element("li", { text: words }));
    $("footer").textContent = data.footer;
  };

  /** A bar of parts, each [words, bytes, colour], to the scale of `whole`. */
  const barOf = (parts, whole) => {
    const bar = element("div", { class: "bar" });
    for (const [words, nbytes, tint] of parts) {
      if (nbytes <= 0) continue;
      const part = element("span", { title: `${words}: ${bytes(nbytes)}` });
      part.style.cssText = `background:${tint};width:${100 * nbytes / (whole || 1)}%`;
      bar.append(part);
    }
    return bar;
  };
  const legendOf = (parts) => parts.filter(([, nbytes]) => nbytes > 0).map(([words, , tint, more]) => {
    const mark = element("span", { class: "swatch" });
    mark.style.background = tint;
    return element("li", {}, mark, more ? `${words} ${more}` : words);
  });

  // Of a job: parameters, buffers, inputs, optimizer states, gradients, outputs, what is added.
  const PARTS = ["output", "others", "random state", "offloaded", "gradient", "passing", "saved"];
  const showAccount = () => {
    const account = data.account;
    const target = $("account-plot");
    if (!account) {
      const known = graphs.filter((graph) => graph.lives.length).slice(0, GRAPHS);
      if (!known.length) return;
      const highest = most(known.map((graph) => most(graph.at)));
      const sums = known.map((graph) => graph.sums(graph.peakPlace));
      $("account-words").textContent = "At the peak, above what was there when the step began. A plan "
        + "that is made with optimizer= has the account of the whole job here.";
      target.replaceChildren(...known.map((graph, i) => {
        const parts = graph.kinds.map((kind, n) => [WORDS[kind], sums[i][n], colour(kind)]);
        const name = graphs.length > 1 ? `${graph.name} alone` : "at the peak";
        return phaseOf(name, bytes(most(graph.at)), barOf(parts, highest));
      }));
      $("account-legend").replaceChildren(...legendOf(known[0].kinds.map((kind, n) => {
        const largest = most(sums.map((row) => row[n]));
        return [WORDS[kind], largest, colour(kind), graphs.length > 1 ? "" : bytes(largest)];
      })));
      return;
    }
    $("account-words").textContent = account.job;
    const whole = Math.max(most(account.phases.map((phase) => phase.peak)), account.total || 0);
    target.replaceChildren(...account.phases.map((phase) => {
      const parts = phase.parts.map(([name, nbytes], n) => [name, nbytes, colour(PARTS[n])]);
      const words = `${bytes(phase.peak)}${phase.planned ? "" : " and what is not planned"}`;
      return phaseOf(phase.name, words, barOf(parts, whole), account.total, whole);
    }));
    const largest = account.phases[0].parts.map(([name, , ], n) => [name,
      most(account.phases.map((phase) => phase.parts[n][1])), colour(PARTS[n])]);
    for (const part of largest) {
      const known = account.rows.find(([name]) => name === part[0]);
      part.push(part[0] === "added while it runs" ? `up to ${bytes(part[1])}` : bytes(known ? known[1] : part[1]));
    }
    const rows = legendOf(largest);
    if (account.total) {
      const mark = element("span", { class: "swatch line dashed" });
      mark.style.borderColor = look().warn;
      const rest = account.total - most(account.phases.map((phase) => phase.peak));
      rows.push(element("li", {}, mark, `total ${bytes(account.total)}, of which ${bytes(Math.abs(rest))} ${rest < 0 ? "missing" : "left"}`));
    }
    $("account-legend").replaceChildren(...rows);
  };
  const phaseOf = (name, words, bar, total, whole) => {
    const made = element("div", { class: "phase" },
      element("div", { class: "phase-name" }, element("span", { text: name }), element("b", { text: words })), bar);
    if (total) {
      const line = element("i", { class: "total" });
      line.style.left = `${100 * total / whole}%`;
      bar.append(line);
    }
    return made;
  };

  // --- memory over the step --------------------------------------------------------------
  const levels = (line) => {
    let level = 0;
    return line.changes.map((change) => (level += change));
  };
  const begins = (line) => {
    let moment = 0;
    return [0, ...line.ns.map((ns) => (moment += ns))];
  };
  class Graph {
    constructor(found) {
      Object.assign(this, found);
      this.at = levels(found.timeline);
      this.starts = begins(found.timeline);
      this.plainAt = found.plain ? levels(found.plain) : [];
      this.plainStarts = found.plain ? begins(found.plain) : [];
      this.length = this.at.length;
      this.peakPlace = Math.max(this.at.indexOf(most(this.at)), 0);
      this.lives = [];
      this.kinds = [];
      if (found.contents) this.read(found.contents);
    }
    read(contents) {
      this.kinds = contents.kinds;
      const flat = contents.lives;
      for (let i = 0; i < flat.length; i += 5) {
        this.lives.push({ maker: flat[i], nbytes: flat[i + 1], first: flat[i + 2],
          last: flat[i + 2] + flat[i + 3], kind: flat[i + 4] });
      }
    }
    words(op) { return op < 0 ? "" : this.contents.names[op][1]; }
    layerOf(op) { return op < 0 ? "" : this.contents.layers[this.contents.names[op][0]]; }
    made(life) {
      if (life.maker >= 0) return this.words(life.maker);
      return this.kinds[life.kind] === "others" ? "beside this step" : "handed to the backward";
    }
    running(place) { return this.contents ? this.words(this.contents.ran[place]) : ""; }
    alive(place) {
      return this.lives.filter((life) => life.first <= place && place <= life.last)
        .sort((a, b) => b.nbytes - a.nbytes || a.first - b.first || a.maker - b.maker);
    }
    sums(place) {
      const found = this.kinds.map(() => 0);
      for (const life of this.alive(place)) found[life.kind] += life.nbytes;
      return found;
    }
    /** Bytes of each kind at each place. */
    areas() {
      const found = this.kinds.map(() => new Float64Array(this.length + 1));
      for (const life of this.lives) {
        found[life.kind][life.first] += life.nbytes;
        found[life.kind][life.last + 1] -= life.nbytes;
      }
      for (const row of found) for (let i = 1; i < row.length; i += 1) row[i] += row[i - 1];
      return found;
    }
    away(place) {
      const now = this.starts[place];
      return this.link ? this.link.values.filter(([, , out, , , , used]) => out <= now && now < used) : [];
    }
  }
  const graphs = data.graphs.map((found) => new Graph(found));
  let shown = graphs[0];
  let place = 0;

  const axisOf = (starts, n) => $("axis").value === "op"
    ? Array.from({ length: n + 1 }, (_, i) => i) : starts.map((ns) => ns / 1e6);
  const step = (row) => [...row, row.length ? row[row.length - 1] : 0];

  const drawMemory = () => {
    const c = look();
    const x = axisOf(shown.starts, shown.length);
    const host = shown.link ? Array.from(shown.at, (_, i) => shown.away(i).reduce((s, v) => s + v[1], 0)) : [];
    const hostMost = most(host);
    const highest = Math.max(1, most(shown.at), most(shown.plainAt), hostMost);
    const showsBudget = shown.budget && shown.budget <= 1.1 * highest;
    const power = unitOf(Math.max(highest, showsBudget ? shown.budget : 0));
    const scaled = (row) => Array.from(row, (nbytes) => nbytes / 1024 ** power);
    const traces = [];
    if (shown.lives.length) {
      const areas = shown.areas();
      shown.kinds.forEach((kind, n) => {
        if (!areas[n].some((nbytes) => nbytes > 0)) return;
        traces.push({ x, y: scaled(step(Array.from(areas[n].subarray(0, shown.length)))), name: WORDS[kind],
          stackgroup: "alive", mode: "lines", hoverinfo: "skip", line: { shape: "hv", width: 0 },
          fillcolor: colour(kind) });
      });
    } else {
      traces.push({ x, y: scaled(step(shown.at)), mode: "lines", hoverinfo: "skip", fill: "tozeroy",
        line: { shape: "hv", width: 0 }, fillcolor: colour("passing") });
    }
    if (shown.plain) {
      traces.push({ x: axisOf(shown.plainStarts, shown.plainAt.length), y: scaled(step(shown.plainAt)),
        mode: "lines", name: "nothing recomputed", hoverinfo: "skip",
        line: { shape: "hv", width: 1.6, color: c.soft, dash: "dot" } });
    }
    if (host.length && hostMost) {
      traces.push({ x, y: scaled(step(host)), mode: "lines", name: shown.link.where, hoverinfo: "skip",
        line: { shape: "hv", width: 2, color: colour("random state"), dash: "dashdot" } });
    }
    traces.push({ x: x.slice(0, shown.length), y: scaled(shown.at), mode: "lines", name: "as planned",
      meta: "plan", line: { shape: "hv", width: 1.4, color: c.ink },
      text: shown.at.map((nbytes, i) => `${escaped(cut(shown.running(i), 60))}<br>${bytes(nbytes)}`),
      hovertemplate: "%{text}<extra></extra>" });
    const forward = shown.timeline.forward;
    const border = $("axis").value === "op" ? forward : shown.starts[forward] / 1e6;
    const shapes = [
      { type: "line", x0: border, x1: border, y0: 0, y1: 1, yref: "paper", layer: "above",
        line: { color: c.soft, width: 1, dash: "dot" } },
      { type: "line", name: "moment", x0: 0, x1: 0, y0: 0, y1: 1, yref: "paper",
        line: { color: c.accent, width: 2 } },
    ];
    const annotations = [["forward", "right"], ["backward", "left"]].map(([text, xanchor]) => ({
      x: border, y: 1, yref: "paper", yanchor: "bottom", xanchor, text: ` ${text} `, showarrow: false }));
    if (showsBudget) {
      const y = shown.budget / 1024 ** power;
      shapes.push({ type: "line", x0: 0, x1: 1, xref: "paper", y0: y, y1: y,
        line: { color: c.warn, width: 1.5, dash: "dash" } });
    }
    const top = Math.max(highest, showsBudget ? shown.budget : 0) / 1024 ** power;
    const last = Math.max(x[x.length - 1] || 1, ...axisOf(shown.plainStarts, shown.plainAt.length).slice(-1));
    Plotly.react("memory-plot", traces, layout({
      hovermode: "x", hoverdistance: -1, shapes, annotations,
      xaxis: { title: { text: $("axis").value === "op" ? "op, in the order of the step" : "modelled time (ms)" },
        range: [0, last], zeroline: false },
      yaxis: { title: { text: UNITS[power] }, range: [0, top * 1.04], fixedrange: true },
    }), CONFIG);
    showLegend(showsBudget, hostMost);
    mark();
  };

  const showLegend = (showsBudget, hostMost) => {
    const rows = [];
    const areas = new Set(shown.lives.map((life) => life.kind));
    shown.kinds.forEach((kind, n) => areas.has(n) && rows.push([swatch(kind), WORDS[kind]]));
    const line = (tint, words, dashed) => {
      const made = element("span", { class: `swatch line ${dashed ? "dashed" : ""}` });
      made.style.borderColor = tint;
      rows.push([made, words]);
    };
    line(look().ink, "as planned", false);
    if (shown.plain) line(look().soft, `nothing recomputed: ${bytes(most(shown.plainAt))} at most`, true);
    if (hostMost) line(colour("random state"), `${shown.link.where}: ${bytes(hostMost)} at most`, true);
    if (shown.budget) line(look().warn, `budget: ${bytes(shown.budget)}${showsBudget ? "" : " (above the picture)"}`, true);
    $("legend").replaceChildren(...rows.map(([mark, words]) => element("li", {}, mark, words)));
  };

  const mark = () => {
    const at = $("axis").value === "op" ? place : shown.starts[place] / 1e6;
    Plotly.relayout("memory-plot", { "shapes[1].x0": at, "shapes[1].x1": at });
  };

  // --- one moment ------------------------------------------------------------------------
  const goTo = (next) => {
    place = Math.min(Math.max(next, 0), Math.max(shown.length - 1, 0));
    $("place").value = place;
    mark();
    showMoment();
  };

  const showMoment = () => {
    const half = place < shown.timeline.forward ? "forward" : "backward";
    const running = shown.running(place) || `op ${count(place + 1)}`;
    const peak = place === shown.peakPlace ? ", the peak" : "";
    const words = $("moment-words");
    words.replaceChildren(`${bytes(shown.at[place] || 0)} while ${running} runs `,
      element("span", { text: `(op ${count(place + 1)} of ${count(shown.length)}, ${half}, at ${time(shown.starts[place])}${peak})` }));
    words.dataset.place = place;
    const known = shown.lives.length > 0;
    $("alive").hidden = $("grouping").parentElement.hidden = !known;
    const body = $("alive").tBodies[0];
    body.replaceChildren();
    $("kinds").replaceChildren();
    if (known) {
      showKinds();
      const alive = shown.alive(place);
      const rows = $("grouping").value === "layer" ? byLayer(alive) : alive.map(valueRow);
      rows.slice(0, LISTED).forEach((row) => body.append(aliveRow(row)));
      const rest = rows.slice(LISTED);
      if (rest.length) {
        const sum = rest.reduce((total, row) => total + row.nbytes, 0);
        body.append(aliveRow({ nbytes: sum, layer: "", made: `${count(rest.length)} others`, kind: "", until: "" }));
      }
    }
    showAway();
  };

  const valueRow = (life) => ({ nbytes: life.nbytes, layer: shown.layerOf(life.maker), made: shown.made(life),
    kind: shown.kinds[life.kind],
    until: life.last === life.first ? "this op" : life.last === shown.length - 1 ? "the end" : `op ${count(life.last + 1)}` });

  const byLayer = (alive) => {
    const found = new Map();
    for (const life of alive) {
      const layer = shown.layerOf(life.maker);
      const row = found.get(layer) || { nbytes: 0, layer, values: 0, kinds: new Map() };
      row.nbytes += life.nbytes;
      row.values += 1;
      const kind = shown.kinds[life.kind];
      row.kinds.set(kind, (row.kinds.get(kind) || 0) + life.nbytes);
      found.set(layer, row);
    }
    return [...found.values()].sort((a, b) => b.nbytes - a.nbytes).map((row) => ({
      nbytes: row.nbytes, layer: row.layer || "(no layer)", until: "",
      made: `${row.layer || "(no layer)"}: ${count(row.values)} ${row.values === 1 ? "value" : "values"}`,
      kind: [...row.kinds].sort((a, b) => b[1] - a[1])[0][0] }));
  };

  const aliveRow = (row) => element("tr", {},
    cell(bytes(row.nbytes), "number"), cell(row.layer, "layer"), cell(row.made, "made"),
    row.kind ? element("td", { class: "fate" }, swatch(row.kind), WORDS[row.kind]) : cell(""),
    cell(row.until, "until"));

  const showKinds = () => {
    const sums = shown.sums(place);
    const parts = shown.kinds.map((kind, n) => [WORDS[kind], sums[n], colour(kind), bytes(sums[n])]);
    $("kinds").replaceChildren(barOf(parts, most(shown.at)), element("ul", { class: "legend" }, ...legendOf(parts)));
  };

  const showAway = () => {
    const away = shown.away(place).slice().sort((a, b) => b[1] - a[1]);
    const sum = away.reduce((total, value) => total + value[1], 0);
    const names = away.slice(0, 3).map((value) => `${value[0]} (${bytes(value[1])})`).join(", ");
    const more = away.length > 3 ? ` and ${count(away.length - 3)} more` : "";
    $("away").textContent = !shown.link ? "" : away.length
      ? `${shown.link.where}: ${bytes(sum)}: ${names}${more}` : `${shown.link.where}: nothing at this moment`;
  };

  const choose = (graph) => {
    shown = graph;
    $("place").max = Math.max(shown.length - 1, 0);
    $("memory-note").textContent = shown.note;
    place = shown.peakPlace;
    $("place").value = place;
    drawMemory();
    showMoment();
  };

  // --- the trade-off ---------------------------------------------------------------------
  const MARKERS = { "this plan": "star", "planned": "circle", "ckpt_pass": "diamond", "torch": "square", "per block": "triangle-up" };
  const FAMILY = { "this plan": "recomputed", "planned": "saved", "ckpt_pass": "saved", "torch": "gradient", "per block": "offloaded" };
  const drawCurve = () => {
    const points = data.curve.points;
    $("curve-note").textContent = points.length > 2 ? ""
      : "More points: plan.report(path, curve=ckpt_pass.sweep(model, ...)), or plans for other budgets.";
    const power = unitOf(most(points.map((p) => p[2])));
    const families = [...new Set(points.map((p) => p[0]))].reverse();
    const traces = families.map((family) => {
      const own = points.filter((p) => p[0] === family).sort((a, b) => a[2] - b[2]);
      return { name: family, mode: own.length > 1 ? "lines+markers" : "markers", cliponaxis: false,
        x: own.map((p) => p[2] / 1024 ** power), y: own.map((p) => 100 * p[3]),
        line: { shape: "hv", width: 1.2, color: colour(FAMILY[family] || "others") },
        marker: { size: family === "this plan" ? 15 : 9, symbol: MARKERS[family] || "x",
          color: colour(FAMILY[family] || "others") },
        text: own.map((p) => `${escaped(p[0])}, ${escaped(p[1])}<br>${bytes(p[2])}, ${(100 * p[3]).toFixed(1)} %`),
        hovertemplate: "%{text}<extra></extra>" };
    });
    Plotly.react("curve-plot", traces, layout({
      showlegend: true, hovermode: "closest",
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "reversed",
        itemclick: false, itemdoubleclick: false },
      margin: { l: 56, r: 14, t: 40, b: 44 },
      xaxis: { title: { text: `peak (${UNITS[power]})` }, range: [0, 1.06 * most(points.map((p) => p[2])) / 1024 ** power || 1] },
      yaxis: { title: { text: "recomputed (%)" }, range: [0, 108 * most(points.map((p) => p[3])) || 1] },
    }), CONFIG);
    $("curve-note").textContent = `Upwards: ${data.curve.cost}. ${$("curve-note").textContent}`.trim();
  };

  // --- decisions -------------------------------------------------------------------------
  const table = data.decisions;
  const several = data.graphs.length > 1;
  const COLUMNS = [
    { name: "layer and op", class: "what", of: (r) => r[2], key: (r) => r.number },
    { name: "class", class: "class", of: (r) => table.classes[r[3]], key: (r) => table.classes[r[3]] },
    { name: "fate", class: "fate", of: (r) => table.fates[r[4]], key: (r) => r[4] },
    { name: "bytes", class: "number", of: (r) => r[6] || bytes(r[5]), key: (r) => r[6] ? Infinity : r[5], down: true },
    { name: "cost", class: "number", of: (r) => cost(r) ? time(cost(r)) : "", key: (r) => cost(r), down: true },
    { name: "runs again", class: "number", of: (r) => r[7] ? `${r[7]} ×` : "", key: (r) => r[7], down: true },
    { name: "reason", class: "reason", of: (r) => table.rules[r[9]], key: (r) => table.rules[r[9]] },
  ];
  const cost = (row) => row[7] * row[8];
  const rows = table.rows.map((row, number) => Object.assign(row, { number,
    words: `${row[2]} ${table.layers[row[1]]} ${table.classes[row[3]]} ${table.rules[row[9]]}`.toLowerCase() }));
  let sorted = { column: 3, down: true };
  let limit = ROWS;

  const matching = () => {
    const words = $("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    const fate = $("fate").value, layer = $("layer").value;
    return rows.filter((row) => (fate === "" || row[4] === Number(fate)) && (layer === "" || row[1] === Number(layer))
      && words.every((word) => row.words.includes(word)));
  };

  const showDecisions = () => {
    const column = COLUMNS[sorted.column];
    const sign = sorted.down ? -1 : 1;
    const found = matching().sort((a, b) => {
      const one = column.key(a), other = column.key(b);
      return one === other ? a.number - b.number : one < other ? -sign : sign;
    });
    const known = found.reduce((total, row) => total + Math.max(row[5], 0), 0);
    const again = found.reduce((total, row) => total + cost(row), 0);
    $("count").textContent = `${count(found.length)} of ${count(rows.length)} ops, ${bytes(known)}`
      + `${again ? `, ${time(again)} of recomputation` : ""}`;
    $("decisions").tBodies[0].replaceChildren(...found.slice(0, limit).map(decisionRow));
    $("more").hidden = found.length <= limit;
    $("more").textContent = `show ${count(Math.min(5 * ROWS, found.length - limit))} more`;
    [...$("decisions").tHead.rows[0].cells].forEach((head, n) => {
      const here = n === sorted.column;
      head.setAttribute("aria-sort", here ? (sorted.down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = COLUMNS[n].name + (here ? (sorted.down ? " ▼" : " ▲") : "");
    });
  };

  const decisionRow = (row) => element("tr", {}, ...COLUMNS.map((column) => {
    if (column.class === "fate") {
      return element("td", { class: "fate" }, swatch(column.of(row)), column.of(row));
    }
    const words = column.of(row);
    return cell(column.class === "what" && several ? `${data.graphs[row[0]].name}: ${words}` : words, column.class);
  }));

  const fillFilters = () => {
    $("fate").append(option("", "every fate"));
    table.fates.forEach((fate, n) => rows.some((row) => row[4] === n) && $("fate").append(option(n, fate)));
    $("layer").append(option("", "every layer"));
    table.layers.forEach((layer, n) => $("layer").append(option(n, cut(layer || "(no layer)", 60))));
    COLUMNS.forEach((column, n) => {
      const button = element("button", { text: column.name });
      button.type = "button";
      button.addEventListener("click", () => {
        sorted = { column: n, down: sorted.column === n ? !sorted.down : Boolean(column.down) };
        showDecisions();
      });
      $("decisions").tHead.rows[0].append(element("th", { class: column.class === "number" ? "number" : "" }, button));
    });
  };

  // --- the beginning ---------------------------------------------------------------------
  const drawAll = () => {
    showAccount();
    if (shown) {
      drawMemory();
      showMoment();
    }
    drawCurve();
    showDecisions();
  };
  showFacts();
  fillFilters();
  graphs.forEach((graph, n) => $("graph").append(option(n, graph.name)));
  $("graph-choice").hidden = graphs.length < 2;
  showAccount();
  if (shown) {
    choose(shown);
    $("memory-plot").on("plotly_hover", (event) => {
      const point = event.points.find((found) => found.data.meta === "plan");
      if (point && point.pointNumber !== place) goTo(point.pointNumber);
    });
  } else {
    $("memory").hidden = true;
  }
  drawCurve();
  showDecisions();
  $("graph").addEventListener("change", () => choose(graphs[Number($("graph").value)]));
  $("axis").addEventListener("change", drawMemory);
  $("to-peak").addEventListener("click", () => goTo(shown.peakPlace));
  $("place").addEventListener("input", () => goTo(Number($("place").value)));
  $("grouping").addEventListener("change", showMoment);
  for (const id of ["text", "fate", "layer"]) {
    $(id).addEventListener("input", () => { limit = ROWS; showDecisions(); });
  }
  $("more").addEventListener("click", () => { limit += 5 * ROWS; showDecisions(); });
  dark.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  document.documentElement.dataset.ready = "true";
})();
