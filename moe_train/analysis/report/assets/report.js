// The report of runs: comparisons, one run in depth, its routing atlas, its translations.
const runs = data.runs;
const shown = () => runs.map((run, index) => ({ run, index, colour: colour(index) })).filter(({ index }) => !hidden.has(index));
const style = (index) => ({ color: colour(index), dash: DASHES[Math.floor(index / COLOURS.length) % DASHES.length] });
if (runs.length > 1) legend(runs.map((run) => run.name));
link("leaderboard", "Leaderboard");
document.querySelectorAll("#leaderboard > .scroll tbody tr").forEach((row, index) => {
  row.firstElementChild.prepend(h("span", { class: "dot", style: { background: colour(index), marginRight: "0.45rem" } }));
});

// --- learning -------------------------------------------------------------------------------------------------------
const trainFlops = (run, tokens) => tokens.map((count) => (count === null || !run.training_flops ? null : count * run.training_flops));
const hasLoss = (run) => numbers(run.valid.nll_loss).length || numbers(run.train.nll_loss).length;
if (runs.some(hasLoss)) {
  const learning = section("learning", "Learning",
    "Loss on held-out sentences in nats per token, lower is better. Training FLOPs count forward, backward and every pass over a batch.");
  const box = h("input", { type: "checkbox", onchange: redraw });
  learning.append(h("div", { class: "controls" }, h("label", {}, box, "loss on training batches, too (dotted)")));
  const grid = h("div", { class: "charts" });
  learning.append(grid);
  const curves = (horizontal, unit) => shown().flatMap(({ run, index }) => {
    const valid = numbers(run.valid.nll_loss).length ? run.valid : run.train;
    const format = { x: "%{x:.3~s}", xUnit: unit, yUnit: "nats per token" };
    const found = [line(run.name, horizontal(run, valid.tokens), valid.nll_loss || [], style(index), format)];
    if (box.checked && run.train.nll_loss) {
      const thin = { ...line(`${run.name}, training`, horizontal(run, run.train.tokens), run.train.nll_loss, { ...style(index), dash: "dot", width: 1 }, format), mode: "lines" };
      found.push({ ...thin, opacity: 0.7 });
    }
    return found;
  });
  const y = { title: "nats per token" };
  chart(grid, "Loss over tokens", "Runs at equal amounts of text.", () => (
    { traces: curves((run, tokens) => tokens, "target tokens"), x: { title: "target tokens", tickformat: "~s", rangemode: "tozero" }, y, height: 320 }));
  chart(grid, "Loss over training FLOPs", "Runs at equal amounts of arithmetic.", () => (
    { traces: curves(trainFlops, "FLOPs"), x: { title: "training FLOPs", tickformat: "~s", rangemode: "tozero" }, y, height: 320 }));
}

// --- quality --------------------------------------------------------------------------------------------------------
const scored = runs.some((run) => run.scores.directions);
const directions = [...new Set(runs.flatMap((run) => (run.scores.directions || []).map((entry) => entry.name)))];
if (scored) {
  const anyWidth = runs.some((run) => (run.scores.directions || []).some((entry) => entry.interval));
  const quality = section("quality", "Quality by direction",
    `${anyWidth ? "Lines are 95 % intervals of bootstrap resampling of the test sentences. " : ""}The grey mark is copying the source.`);
  const grid = h("div", { class: "charts" });
  quality.append(grid);
  const rows = [...(directions.length > 1 ? ["average"] : []), ...directions];
  const found = (run, row) => (row === "average" ? (run.scores.groups || {}).average
    : (run.scores.directions || []).find((entry) => entry.name === row));
  for (const [metric, title] of [["bleu", "BLEU"], ["chrf", "chrF++"]]) {
    chart(grid, title, "0 to 100, higher is better.", (colours) => {
      const present = shown().filter(({ run }) => run.scores.directions);
      const step = 0.72 / Math.max(present.length, 1);
      const traces = present.map(({ run, index, colour: value }, order) => {
        const kept = rows.map((row, at) => [found(run, row), at]).filter(([entry]) => entry);
        return {
          type: "scatter", mode: "markers", name: plain(run.name),
          x: kept.map(([entry]) => entry[metric]), y: kept.map(([, at]) => at + (order - (present.length - 1) / 2) * step),
          customdata: kept.map(([entry, at]) => [plain(rows[at]), entry.interval ? ` ± ${entry.interval[metric].toFixed(1)}` : ""]),
          error_x: { type: "data", array: kept.map(([entry]) => (entry.interval ? entry.interval[metric] : 0)), color: value, thickness: 1.5, width: 0 },
          marker: { color: value, size: present.length > 6 ? 6 : 7.5, symbol: index >= COLOURS.length ? "diamond" : "circle" },
          hovertemplate: `%{fullData.name}<br>%{customdata[0]}: %{x:.1f}%{customdata[1]} ${title}<extra></extra>`,
        };
      });
      const copies = directions.map((name) => runs.map((run) => found(run, name)).find((entry) => entry && entry.copy));
      const marks = copies.map((entry, at) => [entry, at + rows.length - directions.length]).filter(([entry]) => entry);
      traces.unshift({
        type: "scatter", mode: "markers", name: "copying the source", x: marks.map(([entry]) => entry.copy[metric]), y: marks.map(([, at]) => at),
        marker: { symbol: "line-ns-open", size: 16, color: colours.quiet, line: { width: 1.5, color: colours.quiet } }, opacity: 0.6,
        hovertemplate: `copying the source: %{x:.1f} ${title}<extra></extra>`,
      });
      const highest = Math.max(1, ...traces.flatMap(({ x, error_x: width }) => x.map((value, at) => value + (width ? width.array[at] : 0))));
      const bands = rows.map((row, at) => at).filter((at) => at % 2).map((at) => ({
        type: "rect", xref: "paper", x0: 0, x1: 1, y0: at - 0.5, y1: at + 0.5, fillcolor: colours.raised, line: { width: 0 }, layer: "below" }));
      return {
        traces, height: 50 + rows.length * Math.max(26, 9 * present.length + 8), layout: { shapes: bands },
        x: { title, range: [-0.02 * highest, 1.05 * highest] },
        y: { tickvals: rows.map((row, at) => at), ticktext: rows.map(plain), range: [rows.length - 0.5, -0.5], showgrid: false, nticks: 0 },
      };
    });
  }
}

// --- cost -----------------------------------------------------------------------------------------------------------
const average = (run) => ((run.scores.groups || {}).average || {}).chrf;
const quality = scored ? { of: average, title: "chrF++, average", better: (a, b) => a > b, format: ".1f" }
  : { of: (run) => run.loss, title: "held-out nats per token", better: (a, b) => a < b, format: ".3f" };
const spent = (run) => (run.training_flops && run.train.tokens.length ? run.training_flops * run.train.tokens[run.train.tokens.length - 1] : null);
const costs = [
  ["Quality and active FLOPs", "forward FLOPs of a token", (run) => run.flops],
  ["Quality and parameters", "parameters", (run) => run.parameters],
  ["Quality and training FLOPs", "training FLOPs in all", spent],
].filter(([, , cost]) => runs.some((run) => cost(run) && typeof quality.of(run) === "number"));
if (costs.length || runs.some((run) => run.speed)) {
  const cost = section("cost", "Cost", "On the dashed line are runs that no other run beats in both quality and cost.");
  const grid = h("div", { class: "charts" });
  cost.append(grid);
  for (const [title, unit, of] of costs) {
    chart(grid, title, `${quality.title} over ${unit}.`, (colours) => {
      const points = shown().map((entry) => ({ ...entry, x: of(entry.run), y: quality.of(entry.run) }))
        .filter(({ x, y }) => x > 0 && typeof y === "number");
      const front = points.filter((a) => !points.some((b) => b !== a && b.x <= a.x && (b.y === a.y ? b.x < a.x : quality.better(b.y, a.y))))
        .sort((a, b) => a.x - b.x);
      const dots = points.map(({ run, index, colour: value, x, y }) => ({
        type: "scatter", mode: "markers", name: plain(run.name), x: [x], y: [y], marker: { size: 11, color: value, symbol: index >= COLOURS.length ? "diamond" : "circle", line: { color: colours.page, width: 1 } },
        hovertemplate: `%{fullData.name}<br>%{x:.4~s} ${unit}<br>%{y:${quality.format}} ${quality.title}<extra></extra>`,
      }));
      if (front.length) front.push({ x: Math.max(...points.map(({ x }) => x)), y: front[front.length - 1].y });
      const frontier = { type: "scatter", mode: "lines", x: front.map(({ x }) => x), y: front.map(({ y }) => y), line: { color: colours.quiet, dash: "dash", width: 1.2, shape: "hv" }, hoverinfo: "skip" };
      const span = [Math.min(...points.map(({ x }) => x)), Math.max(...points.map(({ x }) => x))];
      const wide = points.length && span[1] > 3 * span[0];
      const margin = 0.08 * (span[1] - span[0]) || 0.1 * span[0];
      const range = wide ? [Math.log10(span[0]) - 0.1, Math.log10(span[1]) + 0.1] : [span[0] - margin, span[1] + margin];
      return {
        traces: [frontier, ...dots], height: 290, y: { title: quality.title },
        x: { title: unit, tickformat: "~s", type: wide ? "log" : "linear", range: points.length ? range : undefined, nticks: narrow.matches ? 4 : 5 },
      };
    });
  }
  for (const unit of ["words/s", "images/s"]) {
    if (!runs.some((run) => run.unit === unit && run.speed)) continue;
    const name = unit === "words/s" ? "target words per second" : "images per second";
    chart(grid, "Training speed", `${name}, median over the log.`, (colours) => {
      const bars = shown().filter(({ run }) => run.speed && run.unit === unit).sort((a, b) => b.run.speed - a.run.speed);
      return {
        height: 50 + 27 * Math.max(bars.length, 1), layout: { bargap: 0.35 },
        traces: [{
          type: "bar", orientation: "h", x: bars.map(({ run }) => run.speed), y: bars.map((_, at) => at), marker: { color: bars.map((bar) => bar.colour) },
          text: bars.map(({ run }) => amount(run.speed)), textposition: "auto", insidetextanchor: "end", textfont: { size: 11.5 },
          hovertemplate: `%{x:,.0f} ${unit}<extra></extra>`,
        }],
        x: { title: unit, tickformat: "~s", nticks: 5 },
        y: { tickvals: bars.map((_, at) => at), ticktext: bars.map(({ run }) => plain(short(run.name, 18))), range: [bars.length - 0.5, -0.5], showgrid: false, nticks: 0, tickfont: { size: 11.5, color: colours.text } },
      };
    });
  }
}
function short(text, most) {
  const found = [...text];
  return found.length > most ? `…${found.slice(-(most - 1)).join("")}` : text;
}

// --- one run --------------------------------------------------------------------------------------------------------
const one = section("run", "One run in depth");
const picker = h("select", { "aria-label": "Run" }, ...runs.map((run, index) => h("option", { value: index }, `${run.name} (${run.strategy})`)));
one.append(h("div", { class: "controls" }, h("label", {}, "run", picker)));
const body = h("div");
one.append(body);
picker.addEventListener("change", () => show(runs[picker.value]));
dark.addEventListener("change", () => show(runs[picker.value])); // the colours of layers depend on it
link("atlas", "Routing atlas");
link("translations", "Translations");
if (runs.length === 1) picker.parentElement.hidden = true;

// Encoder layers are blue, decoder layers orange; later layers are darker.
function layerColours(names) {
  const sides = { encoder: names.filter((name) => name.includes("encoder")), decoder: names.filter((name) => name.includes("decoder")) };
  return names.map((name) => {
    const side = name.includes("decoder") ? "decoder" : "encoder";
    const step = sides[side].indexOf(name) / Math.max(1, sides[side].length - 1), lift = dark.matches ? 10 : 0;
    return side === "decoder" ? `hsl(${34 - 22 * step} 85% ${58 + lift - 16 * step}%)` : `hsl(${200 + 28 * step} 66% ${62 + lift - 20 * step}%)`;
  });
}
const constant = (values) => numbers(values).length > 0 && new Set(numbers(values)).size === 1;

function show(run) {
  forget(body);
  const rows = run.facts.map(([name, value]) => h("tr", {}, h("td", {}, name), h("td", {}, value)));
  body.append(h("details", {}, h("summary", {}, "Facts"), h("table", { class: "facts" }, h("tbody", {}, ...rows))));
  if (run.cause) body.append(h("p", { class: "failed" }, `Failed: ${run.cause}`));
  for (const problem of run.problems) body.append(h("p", { class: "failed" }, problem));
  curvesOf(run);
  loads(run);
  atlas(run);
  translations(run);
}

function curvesOf(run) {
  const updates = run.train.update || [];
  if (!updates.length) return;
  const training = section("training", "Training", "", body);
  const numbersOf = Object.keys(run.layers), names = numbersOf.map((number) => run.layers[number]), tones = layerColours(names);
  const entropies = numbersOf.some((number) => numbers(run.entropy[number]).length);
  const grid = h("div", { class: "charts three" });
  training.append(grid);
  const x = { title: "updates", tickformat: ",d", rangemode: "tozero" };
  const plot = (title, caption, traces, y = {}) => chart(grid, title, caption, () => ({ traces, x, y, height: 240 }));
  const updatesText = { xUnit: "updates" };
  const losses = [];
  if (run.train.nll_loss) losses.push({ ...line("training", updates, run.train.nll_loss, { color: COLOURS[9], width: 1.2 }, updatesText), mode: "lines" });
  if (run.valid.nll_loss) losses.push(line("held-out", run.valid.update, run.valid.nll_loss, { color: COLOURS[0] }, updatesText));
  if (losses.length) plot("Loss", "nats per token: held-out (blue) and training (grey).", losses);
  if (numbers(run.train.lr).length) plot("Learning rate", "of the last update before each log line.", [line("learning rate", updates, run.train.lr, { color: COLOURS[0] }, updatesText)], { rangemode: "tozero", tickformat: ".2~g" });
  if (numbers(run.train.grad_norm).length) plot("Gradient norm", "before clipping, mean of a log line.", [line("gradient norm", updates, run.train.grad_norm, { color: COLOURS[0] }, updatesText)], { rangemode: "tozero" });
  const speed = run.train.images_per_second || run.train.words_per_second;
  if (numbers(speed).length) plot("Speed", `${run.unit} in training.`, [line("speed", updates, speed, { color: COLOURS[0] }, { ...updatesText, yUnit: run.unit, y: "%{y:,.0f}" })], { rangemode: "tozero", tickformat: "~s" });
  for (const name of run.auxiliary) {
    if (name === "loss") continue;
    plot(name.replace(/_/g, " "), "auxiliary loss of the routers.", [line(name, updates, run.train[name], { color: COLOURS[4] }, updatesText)]);
  }
  if (entropies) {
    plot("Router entropy", "nats per token, by layer: 0 is one sure expert.", numbersOf.map((number, at) =>
      line(names[at], updates, run.entropy[number], { color: tones[at] }, { ...updatesText, yUnit: "nats" })), { rangemode: "tozero" });
  }
  const drops = run.train.dropped_fraction;
  if (numbers(drops).length && !(constant(drops) && numbers(drops)[0] === 0)) {
    plot("Drops", "share of (token, expert) choices beyond an expert's capacity.", [line("dropped", updates, drops, { color: COLOURS[2] }, { ...updatesText, y: "%{y:.2%}" })], { tickformat: ".1~%", rangemode: "tozero" });
  } else if (numbers(drops).length) {
    training.append(h("p", { class: "hint" }, "Drops: none, in any update."));
  }
  if (entropies) key(training, names.map((name, at) => [name, tones[at]]));
}

function loads(run) {
  const layers = Object.keys(run.load);
  if (!layers.length) return;
  const load = section("load", "Load per expert", "Tokens of each expert over the mean of its layer, by update. All layers have the same colours.", body);
  const highest = Math.max(2, ...layers.flatMap((layer) => run.load[layer].load.map((row) => Math.max(...row))));
  scale(load, "0, dead", "", `${highest.toFixed(1)} × the mean`, "1 is balanced");
  const grid = h("div", { class: "charts" });
  load.append(grid);
  for (const layer of layers) {
    const { update, load: z } = run.load[layer], experts = z.length;
    chart(grid, run.layers[layer], `${experts} experts.`, () => ({
      height: Math.min(340, 62 + Math.max(14 * experts, 70)),
      traces: [{
        type: "heatmap", x: update, y: z.map((_, expert) => expert), z, zmin: 0, zmax: highest, colorscale: heat(), showscale: false, xgap: 0, ygap: experts > 24 ? 0 : 1,
        hovertemplate: "expert %{y}, update %{x:,}<br>%{z:.2f} × the mean<extra></extra>",
      }],
      x: { title: "updates", tickformat: ",d", showgrid: false },
      y: { title: "expert", tick0: 0, dtick: Math.ceil(experts / 8), tickformat: "d", autorange: "reversed", showgrid: false, nticks: 0 },
    }));
  }
}

// --- the routing atlas ----------------------------------------------------------------------------------------------
function atlas(run) {
  const { layers = [], checkpoints = [], examples = [], sentences = 0 } = run.atlas;
  const found = section("atlas", "Routing atlas", layers.length
    ? `Which expert takes which tokens, on ${sentences} held-out sentences${checkpoints.length > 1 ? `, at updates ${checkpoints.map((update) => update.toLocaleString("en")).join(", ")}` : ""}.`
    : `There is none: ${run.atlas_missing || "the model has no sparse layers"}.`, body);
  if (!layers.length) return;
  const names = layers.map((layer) => layer.name), tones = layerColours(names);
  const measures = h("div", { class: "charts four" });
  const several = checkpoints.length > 1;
  const over = (title, caption, name, y = {}) => {
    if (!layers.some((layer) => numbers(layer[name]).length)) return;
    if (several) {
      chart(measures, title, caption, () => ({
        height: 230, traces: layers.map((layer, at) => ({ ...line(layer.name, checkpoints, layer[name], { color: tones[at] }, { xUnit: "updates" }), mode: "lines+markers" })),
        x: { title: "updates", tickformat: ",d", tickvals: checkpoints }, y: { rangemode: "tozero", ...y },
      }));
    } else {
      chart(measures, title, caption, () => ({
        height: 50 + 26 * layers.length, layout: { bargap: 0.35 },
        traces: [{ type: "bar", orientation: "h", x: layers.map((layer) => layer[name][0]), y: layers.map((_, at) => at), marker: { color: tones }, hovertemplate: "%{x:.4~g}<extra></extra>" }],
        x: { rangemode: "tozero", ...y }, y: { tickvals: layers.map((_, at) => at), ticktext: names.map(plain), range: [layers.length - 0.5, -0.5], nticks: 0, showgrid: false },
      }));
    }
  };
  over("Specialisation", "mutual information of expert and language over the language's entropy, 0 to 1.", "specialisation");
  over("Collapse", "Tr(Σw Σb⁺) of the routers' inputs with the expert as the class; smaller is more collapsed.", "collapse");
  over("Largest load", "of an expert over the mean; 1 is balanced.", "largest_load");
  if (several) over("Fluctuation", "share of tokens whose first expert differs from the checkpoint before.", "fluctuation", { tickformat: ".0%" });
  found.append(measures);
  key(found, names.map((name, at) => [name, tones[at]]));

  const slider = h("input", { type: "range", min: 0, max: layers.length - 1, value: 0, step: 1, id: "layer" });
  const name = h("output", { for: "layer" });
  const control = h("div", { class: "controls" }, h("label", {}, "layer", slider), name);
  if (layers.length === 1) slider.parentElement.hidden = true;
  const view = h("div");
  found.append(h("h3", {}, "Experts by language, and sentences"), control, view);
  const draw = () => {
    const at = Number(slider.value), layer = layers[at];
    name.textContent = `${layer.name} (${at + 1} of ${layers.length})`;
    slider.setAttribute("aria-valuetext", layer.name);
    forget(view);
    layerView(view, layer, layers, examples);
  };
  slider.addEventListener("input", draw);
  draw();
}

// Tags such as </s> begin a sentence of any script, so that dir="auto" does not find its direction.
function rightToLeft(pieces) {
  const text = pieces.join("");
  return (text.match(/[\u0590-\u08ff]/g) || []).length > text.length / 3 ? "rtl" : "ltr";
}
function layerView(view, layer, layers, examples) {
  const experts = layer.experts;
  const highest = Math.max(2, ...layers.flatMap((other) => other.load.flat().map((share) => share * other.experts)));
  if (layer.soft) view.append(h("p", { class: "hint" }, "Every expert takes a part of every token here: shown is the expert with the largest part."));
  scale(view, "0", "", `${highest.toFixed(1)} × an even share`, `of the tokens of each ${layer.groups.length > 1 ? "language" : "set"} (${layer.stack === "decoder" ? "target" : "source"} side)`);
  chart(view, "Expert and language", "share of a language's tokens that an expert takes, over an even share.", (colours) => {
    const z = layer.load.map((row) => row.map((share) => share * experts));
    const labels = experts * layer.groups.length <= 160 && experts <= (narrow.matches ? 8 : 20);
    return {
      height: 58 + Math.max(24 * layer.groups.length, 48),
      traces: [{
        type: "heatmap", z, x: z[0].map((_, expert) => expert), y: layer.groups.map((_, row) => row), zmin: 0, zmax: highest, colorscale: heat(), showscale: false, xgap: 2, ygap: 2,
        texttemplate: labels ? "%{z:.2f}" : "", textfont: { size: 11 }, customdata: z.map((row, at) => row.map(() => plain(layer.groups[at]))),
        hovertemplate: "expert %{x}, %{customdata}<br>%{z:.2f} × an even share<extra></extra>",
      }],
      x: { title: "expert", tick0: 0, dtick: Math.ceil(experts / 16), tickformat: "d", showgrid: false, nticks: 0 },
      y: { tickvals: layer.groups.map((_, row) => row), ticktext: layer.groups.map(plain), autorange: "reversed", showgrid: false, nticks: 0, tickfont: { size: 12, color: colours.text } },
    };
  });
  const rows = examples.filter((example) => example.experts[layer.number] && example[layer.stack]);
  if (!rows.length) return;
  view.append(h("h3", {}, "Sentences"), h("p", { class: "hint" },
    `${layer.stack === "decoder" ? "The target as the decoder reads it" : "The text that the encoder reads"}: colour and small number are the token's first expert.`));
  const used = [...new Set(rows.flatMap((example) => example.experts[layer.number]))].filter((expert) => expert >= 0).sort((a, b) => a - b);
  key(view, used.slice(0, 32).map((expert) => [`expert ${expert}`, colour(expert, experts)]));
  const holder = h("div", { class: "sentences" });
  for (const example of rows) {
    const pieces = example[layer.stack].map((piece, at) => {
      const expert = example.experts[layer.number][at], tone = expert < 0 ? "transparent" : colour(expert, experts);
      const starts = piece.startsWith("▁"), text = starts ? piece.slice(1) || "▁" : piece;
      return h("span", {
        class: starts || at === 0 ? "token word" : "token", title: expert < 0 ? "no expert" : `expert ${expert}`,
        style: { borderColor: tone, background: expert < 0 ? "none" : `color-mix(in srgb, ${tone} 18%, transparent)` },
      }, text, h("sub", {}, expert < 0 ? "–" : String(expert)));
    });
    holder.append(h("span", { class: "set" }, example.set), h("p", { class: "tokens", dir: rightToLeft(example[layer.stack]) }, ...pieces));
  }
  view.append(holder);
}

// --- translations ---------------------------------------------------------------------------------------------------
let direction = "";
function translations(run) {
  const names = Object.keys(run.samples);
  const found = section("translations", "Translations", names.length
    ? "Best, median and worst by chrF++ of the sentence." : "There are no outputs of moe-evaluate in the run folder.", body);
  if (!names.length) return;
  const choice = h("select", { "aria-label": "Direction" }, ...names.map((name) => h("option", { value: name }, name)));
  choice.value = names.includes(direction) ? direction : names[0];
  const list = h("div", { class: "samples" });
  const score = (run.scores.directions || []);
  const fill = () => {
    direction = choice.value;
    const total = score.find((entry) => entry.name === direction);
    const further = total ? Object.entries(total.metrics || {}).map(([name, value]) => `, ${name} ${value.toPrecision(4)}`).join("") : "";
    summary.textContent = total ? `${total.lines} lines: BLEU ${total.bleu.toFixed(1)}, chrF++ ${total.chrf.toFixed(1)}${further}` : "";
    list.replaceChildren(...run.samples[direction].map((sample) => h("article", { class: "sample" },
      h("div", {}, h("span", { class: "kind" }, sample.kind), ` · chrF++ ${sample.chrf} · line ${sample.line}`),
      h("dl", {}, ...[["source", sample.source], ["reference", sample.reference], ["translation", sample.translation]]
        .flatMap(([name, text]) => [h("dt", {}, name), h("dd", { dir: "auto" }, text || "(empty)")])))));
  };
  const summary = h("span", { class: "hint" });
  choice.addEventListener("change", fill);
  found.append(h("div", { class: "controls" }, h("label", {}, "direction", choice), summary), list);
  fill();
}

const first = Math.max(0, runs.findIndex((run) => (run.atlas.layers || []).length));
picker.value = first;
show(runs[first]);
