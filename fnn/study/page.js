"use strict";
const $ = id => document.getElementById(id);
// Plotly reads names as HTML, so they are escaped.
const plain = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const MOST = 12, shown = new Set(), picked = new Map(), chosen = [], slots = new Map(), EVERY = {};
let D, N, most = MOST, light = false, paper = false, printed = false;
const dark = () => !light && !paper && matchMedia("(prefers-color-scheme: dark)").matches;
const PAPER = 680, room = () => paper ? PAPER : innerWidth, narrow = () => room() < 700;
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const list = (words, most = 5) => { const w = words.length > most ? [...words.slice(0, most - 1), `${words.length - most + 1} more`] : words;
  return w.length < 2 ? w.join("") : w.slice(0, -1).join(", ") + " and " + w[w.length - 1]; };
const known = v => v !== null && v !== undefined;
const short = v => known(v) ? (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-3) ? v.toExponential(1).replace("e+", "e") : String(+v.toPrecision(3))) : "";
// A network keeps its look once it has one: colour, and beyond six another line and marker.
const slot = n => { if (!slots.has(n)) slots.set(n, slots.size); return slots.get(n); };
const colour = n => D.colours[slot(n) % D.colours.length];
const dash = n => ["solid", "dot", "dashdot", "longdashdot"][Math.floor(slot(n) / D.colours.length) % 4];
const MARKS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"], SIGNS = "●■▲◆▼✚✖";
const mark = n => MARKS[slot(n) % MARKS.length];  // six colours, seven markers: 42 looks
const members = here => [...shown].sort((a, b) => a - b).filter(n => here[n]);
const seedsOf = ns => { const s = ns.map(n => D.networks[n].seeds), a = Math.min(...s), b = Math.max(...s); return a === b ? plural(a, "seed") : `${a} to ${b} seeds`; };

function layout(x, y, more = {}) {
  const ink = dark() ? "#e8e8e8" : "#1a1a1a", grid = dark() ? "#3a3d42" : "#e2e2e2";
  const axis = (text, own) => Object.assign({title: {text: plain(text)}, zeroline: false, gridcolor: grid, linecolor: grid, exponentformat: "power", automargin: true}, own);
  const low = narrow() || more.below;
  return Object.assign({margin: {l: 60, r: 12, t: 34, b: 45}, modebar: {bgcolor: "rgba(0,0,0,0)", color: dark() ? "#888" : "#999", activecolor: ink}, hovermode: "closest", paper_bgcolor: light ? "#fff" : "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: ink, family: "system-ui, sans-serif", size: 13}, hoverlabel: {font: {size: 13}},
    legend: low ? {orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", font: {size: 12}} : {font: {size: 12}},
    xaxis: axis(x, more.x), yaxis: axis(y, more.y)}, more.whole);
}
const OPTIONS = {displaylogo: false, responsive: true, displayModeBar: "hover", modeBarButtons: [["zoomIn2d", "zoomOut2d", "pan2d", "resetScale2d"]]};

// Plotly writes 0.5 as a bare 5 between its decades, so the ticks of a short log axis are chosen here.
function decades(low, top) {
  const at = steps => { const found = []; for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(top)); k++) for (const s of steps) found.push(+(s * 10 ** k).toPrecision(3)); return found.filter(v => v >= 0.8 * low && v <= 1.25 * top); };
  const few = at([1, 2, 5]), vals = few.length > 2 ? few : at([1, 1.2, 1.5, 1.8, 2.2, 2.6, 3, 3.5, 4, 5, 6, 7, 8.5]);
  return {tickvals: vals, ticktext: vals.map(String)};
}

function put(id, data, lay, height) {
  // Room for the legend below: a line for each entry at most.
  const named = data.filter(t => t.showlegend !== false && t.name).length;
  const below = lay.legend.orientation === "h" ? 24 * Math.ceil(named / Math.max(1, Math.floor(room() / 340))) : 0;
  lay.height = (height || 420) + below;
  if (below) lay.margin.b += below + 20;
  lay.width = paper ? PAPER : printed ? $(id).clientWidth : undefined;  // react keeps a width once it has one
  if (light) return [data, lay];
  $(id).style.height = lay.height + "px";
  Plotly.react(id, data, lay, OPTIONS);
}

// A median with its band. Values that are not finite (a zero gradient's log) are gaps.
function curve(n, c, text) {
  const back = c.x.slice().reverse(), ink = colour(n);
  const band = {x: c.x.concat(back), y: c.high.concat(c.low.slice().reverse()), fill: "toself", fillcolor: ink + "33",
    line: {width: 0}, mode: "lines", hoverinfo: "skip", showlegend: false, legendgroup: n};
  const line = {x: c.x, y: c.middle, mode: c.x.length > 40 ? "lines" : "lines+markers", line: {color: ink, width: 2, dash: dash(n)},
    marker: {size: 5, symbol: mark(n)}, name: plain(D.networks[n].name), showlegend: true, legendgroup: n, hovertemplate: text + "<extra>%{fullData.name}</extra>"};
  return c.high.some(v => v === null) || c.low.some(v => v === null) ? [line] : [band, line];
}

EVERY.layers = () => {
  const told = D.series.find(s => s.id === $("series").value), step = D.steps[+$("step").value];
  if (!told) { $("layers-says").textContent = "Nothing was recorded by layer."; $("layers").hidden = true; return; }
  const here = (D.layers[told.id] || {})[step] || {}, ns = members(here), theory = [];
  const traces = ns.flatMap(n => curve(n, here[n], `layer %{x}: ${told.log ? "10^" : ""}%{y:.4g}`));
  for (const n of ns) if (here[n].predicted)
    theory.push({x: here[n].x, y: here[n].predicted, mode: "lines", line: {color: dark() ? "#fff" : "#000", width: 1.3, dash: "dash"}, name: "theory at this width",
      showlegend: !theory.length, legendgroup: "theory", hovertemplate: "layer %{x}: predicted 10^%{y:.4g}<extra></extra>"});
  $("stepnow").textContent = step;
  const deepest = Math.max(1, ...ns.map(n => here[n].x[here[n].x.length - 1]));
  const range = [1 - 0.03 * deepest, deepest + 0.03 * deepest], ticks = deepest < 8 ? {dtick: 1} : {};
  const drawn = put("layers", traces.concat(theory), layout("hidden layer (1 is next to the input)", told.axis, {x: Object.assign({range}, ticks)}));
  const missing = shown.size - ns.length, gaps = ns.filter(n => here[n].middle.includes(null)).length;
  let text = ns.length ? `Each line is one network's ${told.about}, ${step === 0 ? "at initialisation" : `after ${plural(step, "step")}`}: the median of ${seedsOf(ns)}, shaded from the 10th to the 90th percentile` +
    (D.thinned ? "; of deep networks every few layers are drawn" : "") + "." : "";
  if (theory.length) {
    const far = ns.filter(n => D.networks[n].outside > 0.05), banded = ns.filter(n => known(D.networks[n].outside)).length;
    text += ` The dashed curve is theory at this width, shifted to pass through the last hidden layer; ${theory.length === ns.length ? "every network shown has one" : `${theory.length} of ${ns.length} networks shown have one`}${banded < theory.length ? ` (${banded} with a band)` : ""}. ` + (far.length ?
      `Outside of its band more often than the expected 5%: ${list(far.map(n => `${D.networks[n].name} (${D.networks[n].percent})`))}.` :
      banded ? "None of them lies outside of its band more often than the expected 5%." : "");
  }
  if (gaps) text += ` Gaps are numbers that are zero or not finite (${plural(gaps, "network")}).`;
  if (missing) text += ` ${plural(missing, "chosen network")} ${missing === 1 ? "has" : "have"} no such number at this step.`;
  $("layers-says").textContent = text || "No network is chosen.";
  return drawn;
};

// Numbers of whole networks against the first axis with numbers; lines join networks that are equal but for that axis.
function against(id, get, y, more) {
  const a = Math.max(0, D.axes.findIndex(x => x.numbers && x.numbers.length > 1)), axis = D.axes[a];
  const groups = new Map(), ns = members(D.networks.map(get));
  for (const n of ns) { const key = JSON.stringify(D.networks[n].at.filter((_, i) => i !== a)); groups.set(key, [...(groups.get(key) || []), n]); }
  const x = n => axis ? (axis.numbers ? axis.numbers : axis.values.map(plain))[D.networks[n].at[a]] : "", theory = [];
  const traces = [...groups.values()].map((group, g) => {
    group.sort((i, j) => axis ? D.networks[i].at[a] - D.networks[j].at[a] : 0);
    const v = group.map(n => get(D.networks[n], n)), name = D.axes.map((other, i) => i === a ? "" : other.labels[D.networks[group[0]].at[i]]).filter(Boolean).join(", ");
    if (v.some(t => known(t[3]))) theory.push({x: group.map(x), y: v.map(t => t[3]), mode: "lines+markers", line: {color: dark() ? "#fff" : "#000", width: 1.3, dash: "dash"},
      marker: {symbol: "line-ew-open", size: 12}, name: "theory at this width", showlegend: !theory.length, hovertemplate: "predicted %{y:.4g}<extra></extra>"});
    const look = {name: plain(name), legendgroup: "g" + g}, symbol = MARKS[g % 7];
    const points = {...look, showlegend: false, x: group.map(x), y: v.map(t => t[1]), mode: "lines+markers", line: {color: dark() ? "#999" : "#777", width: 1, dash: ["solid", "dot", "dashdot", "longdashdot"][Math.floor(g / 7) % 4]},
      marker: {size: 9, symbol, color: group.map(colour)}, text: group.map(n => plain(D.networks[n].name)),
      error_y: {type: "data", symmetric: false, array: v.map(t => t[2] - t[1]), arrayminus: v.map(t => t[1] - t[0]), width: 3, thickness: 1, color: dark() ? "#aaa" : "#777"},
      hovertemplate: "%{text}: %{y:.4g}<extra></extra>"};
    return [points, {...look, showlegend: !!name, x: [null], y: [null], mode: "lines+markers", line: points.line, marker: {size: 9, symbol, color: points.line.color}}]; }).flat();
  const numbers = axis && axis.numbers, log = numbers && numbers[0] > 0 && numbers[numbers.length - 1] >= 8 * numbers[0];
  const ticks = numbers ? {type: log ? "log" : "linear", tickvals: numbers, ticktext: axis.values.map(plain)} : {type: "category"};
  return [put(id, traces.concat(theory), layout(axis ? axis.word : "", y, Object.assign({x: ticks, below: true}, more))), ns, theory.length, axis];
}
const COLOURS = "Points have the colours of the networks above; lines join networks that are equal otherwise.";

EVERY.rate = () => {
  const title = "growth of log10 |dL/dh| per layer", any = D.networks.some(r => known(r.growth));
  if (!($("rate-part").hidden = !any)) return (D.map.length === 2 && drawMap(title)) || drawGrowth(title);
};
function drawGrowth(title) {
  const zero = {shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, line: {width: 1, dash: "dot", color: dark() ? "#ccc" : "#333"}}]};
  const [drawn, ns, theory] = against("rate", r => known(r.growth) && [r.growth_low, r.growth, r.growth_high, r.growth_predicted], title, {whole: zero});
  $("rate-says").textContent = ns.length ? `How log10 |dL/dh| changes for each layer towards the input: above 0 (dotted) gradients grow, below 0 they shrink. Medians of ${seedsOf(ns)}, bars from the 10th to the 90th percentile` +
    (theory ? "; theory at this width dashed. " : ". ") + COLOURS : "No chosen network has an error signal in two layers.";
  return drawn;
}
function drawMap(title) {
  // One combination of the other axes at a time: that of the first chosen network.
  const [d, w] = D.map, key = n => JSON.stringify(D.networks[n].at.filter((_, i) => !D.map.includes(i))), first = shown.size ? Math.min(...shown) : 0;
  const group = D.networks.map((_, n) => n).filter(n => key(n) === key(first)), at = (n, i) => D.axes[i].numbers[D.networks[n].at[i]];
  const [depths, sigmas] = D.map.map(i => [...new Set(group.map(n => at(n, i)))].sort((a, b) => a - b));
  if (depths.length < 2 || sigmas.length < 2) return null;
  const z = depths.map(a => sigmas.map(b => { const n = group.find(n => at(n, d) === a && at(n, w) === b); return n === undefined ? null : D.networks[n].growth; }));
  const all = D.networks.map(r => r.growth).filter(known).map(Math.abs).sort((a, b) => a - b), reach = Math.max(0.002, all[Math.floor(0.95 * (all.length - 1))]);
  const line = D.networks[first].critical, inside = known(line) && line >= sigmas[0] && line <= sigmas[sigmas.length - 1];
  const drawn = put("rate", [{type: "heatmap", x: sigmas, y: depths.map(String), z, zmin: -reach, zmax: reach, colorscale:
    [[0, "#b35806"], [0.25, "#fdb863"], [0.5, "#f7f7f7"], [0.75, "#b2abd2"], [1, "#542788"]], colorbar: {title: {text: "log10<br>per layer"}},
    hovertemplate: "σ_w %{x}, depth %{y}: %{z:.4f}<extra></extra>"}], layout("σ_w", "depth", {x: {tickvals: sigmas.length < 12 ? sigmas : undefined}, y: {type: "category"}, whole: {shapes:
    inside ? [{type: "line", x0: line, x1: line, yref: "paper", y0: 0, y1: 1, line: {dash: "dash", width: 2, color: "#000"}}] : []}}));
  const name = D.axes.map((axis, i) => D.map.includes(i) ? "" : axis.labels[D.networks[first].at[i]]).filter(Boolean).join(", ");
  $("rate-says").textContent = `${title[0].toUpperCase()}${title.slice(1)} towards the input, medians of ${seedsOf(group)}, for ${name || "all networks"}` + (name ? ", the combination of the first chosen network" : "") +
    ": purple grows, orange shrinks. " + (inside ? `On the dashed critical line of mean-field theory, σ_w = ${line}, it does not change.` : "Mean-field theory has no critical line in this range.") +
    (all.length && all[all.length - 1] > reach ? " The strongest 5% have the last colour." : "");
  return drawn || true;
}

EVERY.training = () => {
  const told = D.runSeries.find(s => s.id === $("run").value);
  if ($("training-part").hidden = !told) return;
  const here = D.runs[told.id], ns = members(here), all = ns.flatMap(n => here[n].middle).filter(known), positive = all.every(v => v > 0);
  const top = all.reduce((a, b) => Math.max(a, b), -Infinity), low = all.reduce((a, b) => Math.min(a, b), Infinity);
  const drawn = put("training", ns.flatMap(n => curve(n, here[n], "step %{x}: %{y:.4g}")), layout("step", told.axis, {y: told.loss && positive ? {type: "log", ...(top < 300 * low ? decades(low, top) : {})} : {}}));
  const lost = [...shown].filter(n => D.networks[n].diverged > 0), asked = [...shown].some(n => known(D.networks[n].diverged)), ends = n => here[n].middle.filter(known);
  const worse = told.id.includes("loss") ? ns.filter(n => { const m = ends(n); return m.length > 1 && m[m.length - 1] > m[0]; }) : [];
  const without = [...shown].filter(n => !here[n]);
  $("training-says").textContent = (!ns.length ? "The chosen networks have no such record at two steps. " :
    `The ${told.about} against the step: the median of ${seedsOf(ns)}, shaded from the 10th to the 90th percentile. ` +
    (worse.length ? `It ends above where it began in ${list(worse.map(n => `${D.networks[n].name} (${short(ends(n)[0])} to ${short(ends(n).pop())})`))}. ` : "") +
    (lost.length ? `Ended because loss or gradient was not finite: ${list(lost.map(n => `${D.networks[n].diverged} of ${D.networks[n].seeds} runs of ${D.networks[n].name}`))}.` :
      asked ? "Loss and gradient of every run shown stayed finite." : "")) +
    (ns.length && without.length ? ` Not drawn, with a record of fewer than two steps: ${list(without.map(n => D.networks[n].name))}.` : "");
  return drawn;
};

EVERY.accuracy = () => {
  if ($("accuracy-part").hidden = !Object.keys(D.finals).length) return;
  const line = known(D.chance) ? {shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: D.chance, y1: D.chance, line: {width: 1.5, dash: "dot", color: dark() ? "#ccc" : "#333"}}],
    annotations: [{xref: "paper", x: 1, y: D.chance, yanchor: "middle", xanchor: "left", text: "chance", showarrow: false}], margin: {l: 60, r: 55, t: 34, b: 45}} : {};
  const [drawn, ns] = against("accuracy", (r, n) => D.finals[n], "accuracy", {y: {range: [0, 1.03]}, whole: line});
  $("accuracy-says").textContent = ns.length ? `Accuracy on held-out examples at the last recorded step (step ${D.last}; of a run that ended early, before): medians of ${seedsOf(ns)}, bars from the 10th to the 90th percentile` +
    (known(D.chance) ? `; dotted, chance: always the commonest label (${short(D.chance)}). ` : ". ") + COLOURS : "No accuracy was recorded of the chosen networks.";
  return drawn;
};

function columns() {
  const fixed = (v, digits) => known(v) ? (v > 0 ? "+" : "") + v.toFixed(digits).replace("-", "−") : "", some = k => D.networks.some(r => known(r[k]) && r[k] !== 0);
  const band = r => known(r.growth) ? `${fixed(r.growth, 4)} [${fixed(r.growth_low, 4)}, ${fixed(r.growth_high, 4)}]` : "";
  return [["gradient", "gradient", r => r.gradient || "unknown"], ["growth", "log10 |dL/dh| per layer [10%, 90%]", band], ["growth_predicted", "theory", r => fixed(r.growth_predicted, 4)],
    ["outside", "outside of band", r => r.percent], ["accuracy", "accuracy", r => known(r.accuracy) ? r.accuracy.toFixed(3) : ""],
    ["training", "training", r => r.training || ""], ["diverged", "not finite", r => known(r.diverged) ? `${r.diverged} of ${r.seeds}` : ""], ["seeds", "seeds", r => r.seeds]].filter(([k]) => some(k));
}
const passes = n => D.networks[n].at.every((v, i) => chosen[i].has(v));

function makeTable() {
  const cell = (tag, text) => Object.assign(document.createElement(tag), {textContent: text});
  const head = document.createElement("tr"), body = $("networks").tBodies[0], cols = columns();
  head.append(cell("th", "network"), ...cols.map(([, name]) => cell("th", name)));
  $("networks").tHead.replaceChildren(head);
  body.replaceChildren(...D.networks.map((r, n) => {
    const row = document.createElement("tr"), name = cell("td", r.name), swatch = document.createElement("span");
    swatch.className = "swatch"; swatch.textContent = "○"; swatch.setAttribute("aria-hidden", "true");
    name.prepend(swatch);
    row.append(name, ...cols.map(([, , f]) => cell("td", f(r))));
    row.tabIndex = 0;
    row.onclick = () => { picked.set(n, !shown.has(n)); draw(); };
    row.onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); row.click(); } };
    return row; }));
}

function choose() {
  const auto = D.networks.map((_, n) => n).filter(n => picked.has(n) ? picked.get(n) : passes(n)), byHand = auto.filter(n => picked.get(n));
  const room = Math.max(0, most - byHand.length), rest = auto.filter(n => !picked.get(n));
  shown.clear();
  for (const n of [...byHand, ...rest.slice(0, room)].sort((a, b) => a - b)) { shown.add(n); slot(n); }
  const cut = rest.length - Math.min(room, rest.length);
  $("hidden").textContent = `${shown.size} of ${plural(N, "network")} ${N === 1 ? "is" : "are"} drawn` + (cut ? `; ${cut} more fit the axes, but only the first ${most} are drawn: press "show all", or choose rows.` : ".");
  [...$("networks").tBodies[0].rows].forEach((row, n) => {
    row.className = shown.has(n) ? "shown" : "";
    row.setAttribute("aria-selected", shown.has(n));
    const swatch = row.querySelector(".swatch");
    swatch.textContent = shown.has(n) ? SIGNS[MARKS.indexOf(mark(n))] : "○";
    swatch.style.color = shown.has(n) ? colour(n) : "";
  });
}
function draw() { choose(); for (const each of Object.values(EVERY)) each(); }

function reset() {
  // At first one value of each axis, but all depths and norms; all networks where they are few.
  picked.clear(); most = MOST;
  D.axes.forEach((axis, i) => { chosen[i] = new Set(axis.values.map((_, v) => v).filter(v => N <= MOST || axis.word === "depth" || axis.word === "norm" || v === D.networks[0].at[i])); });
  press();
}
const press = () => document.querySelectorAll("#axes button").forEach(b => b.setAttribute("aria-pressed", chosen[+b.dataset.axis].has(+b.dataset.value)));

function save(id, format) {
  // What is printed is dark on white, whatever the screen looks like.
  light = true;
  const [data, lay] = EVERY[id]();
  light = false;
  Plotly.downloadImage({data, layout: lay}, {format, width: 900, height: lay.height, filename: `${document.title.split(":")[0]} ${id}`});
}

function start() {
  N = D.networks.length;
  D.axes.forEach((axis, i) => {
    const line = document.createElement("fieldset");
    line.append(Object.assign(document.createElement("legend"), {textContent: axis.word}));
    axis.values.forEach((value, v) => {
      const button = Object.assign(document.createElement("button"), {textContent: value, type: "button"});
      button.dataset.axis = i; button.dataset.value = v;
      button.onclick = () => { chosen[i].has(v) ? chosen[i].delete(v) : chosen[i].add(v); press(); draw(); };
      line.append(button);
    });
    $("axes").append(line);
  });
  const option = s => Object.assign(document.createElement("option"), {value: s.id, textContent: s.about});
  $("series").append(...D.series.map(option));
  $("run").append(...D.runSeries.map(option));
  $("step").max = D.steps.length - 1;
  $("stepper").hidden = D.steps.length < 2;
  $("stepper").style.display = D.steps.length < 2 ? "none" : "";
  $("series").onchange = $("step").oninput = EVERY.layers;
  $("run").onchange = EVERY.training;
  $("all").onclick = () => { most = N; picked.clear(); D.axes.forEach((axis, i) => chosen[i] = new Set(axis.values.map((_, v) => v))); press(); draw(); };
  $("back").onclick = () => { reset(); draw(); };
  $("all").hidden = $("back").hidden = N < 2;
  for (const id of Object.keys(EVERY)) {
    const line = Object.assign(document.createElement("p"), {className: "export"});
    for (const format of ["svg", "png"]) line.append(Object.assign(document.createElement("button"), {type: "button", textContent: `save as ${format.toUpperCase()}`, onclick: () => save(id, format)}));
    $(id + "-says").after(line);
  }
  for (const button of document.querySelectorAll(".copy")) button.onclick = () => {
    const range = document.createRange();
    range.selectNodeContents($(button.dataset.of));
    getSelection().removeAllRanges(); getSelection().addRange(range);
    document.execCommand("copy");
    button.textContent = "copied";
  };
  makeTable(); reset(); draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) addEventListener(event, () => { paper = printing; printed ||= printing; draw(); });
  let wide = narrow();
  addEventListener("resize", () => { if (printed || narrow() !== wide) { wide = narrow(); draw(); } });
  document.body.dataset.ready = "yes";
}

// Data and plotly lie in the page compressed. Data are parsed as JSON, not run.
async function unpack(id) {
  const bytes = Uint8Array.from(atob($(id).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
(async () => {
  try {
    const script = document.createElement("script");
    D = JSON.parse(await unpack("data"));
    script.textContent = await unpack("plotly");
    document.head.append(script);
    start();
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent = typeof DecompressionStream === "undefined" ? "The figures need a browser of 2023 or later." : `The figures could not be drawn: ${error}`;
    throw error;
  }
})();
