// The page over studies: claims with their outcome, measures of variants with their seeds, learning curves.
link("overview", "Studies");
const LABELS = {
  bleu: "BLEU, average", chrf: "chrF++, average", loss: "held-out loss, nats per token", words_per_second: "training speed, words/s",
  training_flops: "training FLOPs", accuracy: "test accuracy", valid_accuracy: "validation accuracy", perplexity: "perplexity",
  zero_shot_f1: "zero-shot macro-F1", english_f1: "English macro-F1", dropped_fraction: "dropped tokens", consistency: "consistency between runs",
  fluctuation: "fluctuation", collapse_last: "collapse at the end", milliseconds_per_image: "ms per image", train_images_per_second: "training speed, images/s",
};
const SKIPPED = ["copy", "better", "worse"];
const label = (name) => LABELS[name] || name.replace(/_/g, " ");
// Of several seeds: first measures that all variants have, in the order of LABELS.
function measuresOf(variants) {
  const names = [...new Set(variants.flatMap((variant) => Object.keys(variant.measures)))].filter((name) => !SKIPPED.includes(name));
  const order = (name) => (LABELS[name] ? Object.keys(LABELS).indexOf(name) : 100);
  const present = (name) => variants.filter((variant) => variant.measures[name]).length;
  return names.filter((name) => present(name) > 1).sort((a, b) => order(a) - order(b)).slice(0, 9);
}
const outcome = (agrees) => (["yes", "above"].includes(agrees) ? "yes" : ["no", "below"].includes(agrees) ? "no" : "undecided");

for (const study of data.studies) {
  const found = section(study.name, study.title, `${study.runs} runs, ${Math.round(study.minutes).toLocaleString("en")} core-minutes of training.`);
  claims(found, study);
  const tones = study.variants.map((_, index) => colour(index, study.variants.length));
  curves(found, study, tones);
  const grid = h("div", { class: "charts three" });
  for (const measure of measuresOf(study.variants)) dots(grid, study, measure, tones);
  found.append(h("h3", {}, "Measures"), h("p", { class: "hint" }, "Ring: the mean over seeds, with the standard deviation; small dots: the seeds."), grid);
  for (const note of study.notes) found.append(h("p", { class: "note" }, note));
  found.append(h("p", { class: "note" }, `Made by ${study.made}.`));
}
for (const search of data.searches) searched(search);

const cut = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);
function claims(parent, study) {
  if (!study.claims.length) return;
  parent.append(h("ul", { class: "claims" }, ...study.claims.map((claim) => h("li", {},
    h("div", {}, h("b", {}, claim.paper || "claim"), h("span", { class: `badge ${outcome(claim.agrees)}` }, claim.agrees || "?")),
    h("div", {}, claim.says || ""), h("div", { class: "hint" }, `measured: ${claim.measured || "–"}`)))));
  const decided = study.claims.filter((claim) => claim.decision && typeof claim.decision.effect === "number");
  if (!decided.length) return;
  const box = h("div", { class: "charts" });
  parent.append(box);
  chart(box, "Effects", "BLEU, with the interval of the decision rule; equal is between the dotted lines.", (colours) => ({
    height: 60 + 34 * decided.length,
    traces: [{
      type: "scatter", mode: "markers", x: decided.map(({ decision }) => decision.effect), y: decided.map((_, at) => at), marker: { size: 9, color: COLOURS[0] },
      error_x: { type: "data", symmetric: false, array: decided.map(({ decision: d }) => d.high - d.effect), arrayminus: decided.map(({ decision: d }) => d.effect - d.low), color: COLOURS[0], thickness: 1.5, width: 0 },
      hovertemplate: "%{x:+.2f} BLEU<extra></extra>",
    }],
    x: { title: "BLEU" },
    y: { tickvals: decided.map((_, at) => at), ticktext: decided.map((claim) => plain(cut(claim.says, narrow.matches ? 18 : 44))), range: [decided.length - 0.5, -0.5], nticks: 0 },
    layout: { shapes: [[0, "solid"], [-0.5, "dot"], [0.5, "dot"]].map(([x, dash]) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: colours.quiet, width: 1, dash } })) },
  }));
}

function curves(parent, study, tones) {
  const shown = study.variants.map((variant, at) => [variant, tones[at]]).filter(([variant]) => variant.curves.length);
  if (!shown.length) return;
  const box = h("div", { class: "charts" });
  parent.append(box);
  for (const [by, title, unit] of [["tokens", "Loss over tokens", "target tokens"], ["flops", "Loss over training FLOPs", "FLOPs"]]) {
    chart(box, title, "held-out loss, a line per seed.", () => ({
      height: 320, x: { title: unit, tickformat: "~s", rangemode: "tozero" }, y: { title: "nats per token" },
      traces: shown.flatMap(([variant, tone]) => variant.curves.map((curve) => line(variant.name, curve[by], curve.nll, { color: tone }, { x: "%{x:.3~s}", xUnit: unit, yUnit: "nats per token" }))),
    }));
  }
  key(parent, shown.map(([variant, tone]) => [variant.name, tone]));
}

function dots(grid, study, measure, tones) {
  const shown = study.variants.map((variant, at) => ({ variant, tone: tones[at], entry: variant.measures[measure] })).filter(({ entry }) => entry);
  const several = shown.some(({ entry }) => entry.values.length > 1);
  chart(grid, label(measure), several ? `up to ${Math.max(...shown.map(({ entry }) => entry.values.length))} seeds.` : "one seed.", (colours) => ({
    height: 44 + 24 * shown.length,
    traces: [
      { type: "scatter", mode: "markers", hoverinfo: "skip", x: shown.flatMap(({ entry }) => entry.values), y: shown.flatMap(({ entry }, at) => entry.values.map(() => at)), marker: { size: 4, color: colours.quiet, opacity: 0.7 } },
      ...shown.map(({ variant, tone, entry }, at) => ({
        type: "scatter", mode: "markers", name: plain(variant.name), x: [entry.mean], y: [at], marker: { size: 9, color: tone, symbol: "circle-open", line: { width: 2, color: tone } },
        error_x: { type: "data", array: [entry.deviation || 0], color: tone, thickness: 1.5, width: 0 },
        hovertemplate: `%{fullData.name}<br>%{x:.5~g} ± ${amount(entry.deviation || 0)}<extra></extra>`,
      })),
    ],
    x: { tickformat: Math.max(...shown.map(({ entry }) => Math.abs(entry.mean))) >= 1000 ? "~s" : "", nticks: 4 },
    y: { tickvals: shown.map((_, at) => at), ticktext: shown.map(({ variant }) => plain(variant.name)), range: [shown.length - 0.5, -0.5], nticks: 0, tickfont: { size: 11.5, color: colours.text } },
  }));
}

function searched(search) {
  const { candidates } = search;
  const found = section(search.name, `${search.name[0].toUpperCase()}${search.name.slice(1)}: the search`, "Held-out bits per character of candidates at equal core-minutes, lower is better.");
  const tones = candidates.map((_, index) => colour(index, candidates.length));
  const curved = candidates.map((candidate, at) => [candidate, tones[at]]).filter(([candidate]) => numbers(candidate.curve).length);
  const box = h("div", { class: "charts" });
  for (const [by, title, unit] of [["tokens", "Loss over tokens", "target tokens"], ["flops", "Loss over training FLOPs", "FLOPs"]]) {
    if (!curved.some(([candidate]) => candidate[by].some((value) => value > 0))) continue;
    chart(box, title, "bits per character.", () => ({
      height: 320, x: { title: unit, tickformat: "~s", rangemode: "tozero" }, y: { title: "bits per character" },
      traces: curved.map(([candidate, tone]) => line(candidate.name, candidate[by], candidate.curve, { color: tone }, { x: "%{x:.3~s}", xUnit: unit, yUnit: "bits per character" })),
    }));
  }
  const rows = candidates.map((candidate, at) => h("tr", {}, h("td", {}, h("span", { class: "dot", style: { background: tones[at] } }), ` ${candidate.name}`),
    ...[candidate.bits.toFixed(4), amount(candidate.minutes), amount(candidate.parameters)].map((cell) => h("td", { class: "number" }, cell)), h("td", {}, candidate.changes || "–")));
  const heads = ["candidate", "bits per character", "core-minutes", "parameters", "changes"].map((name, at) => h("th", { scope: "col", class: at > 0 && at < 4 ? "number" : "" }, name));
  found.append(box, h("div", { class: "scroll", tabindex: "0" }, h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows))));
}
