// The page of moe-serve. Text of sentences is only ever put into text nodes.
const at = (id) => document.getElementById(id);
const h = (name, properties, ...children) => {
  const node = document.createElement(name);
  Object.assign(node, properties);
  node.append(...children);
  return node;
};
const dark = matchMedia("(prefers-color-scheme: dark)");
let translations = [];

// Neighbouring numbers get distant hues; every second turn of the circle is darker.
function colours(expert) {
  const hue = (expert * 137.508 + 25) % 360, deep = Math.floor(expert / 8) % 2;
  return dark.matches
    ? { background: `hsl(${hue} 45% ${deep ? 24 : 32}%)`, color: "#fff" }
    : { background: `hsl(${hue} 75% ${deep ? 72 : 83}%)`, color: "#14171a" };
}

function paint(node, expert) {
  const { background, color } = colours(expert);
  node.style.background = background;
  node.style.color = color;
  return node;
}

function say(text) {
  at("message").textContent = text;
  at("message").hidden = !text;
}

// Encoder layers colour the source, decoder layers the translation.
function layers() {
  const first = translations.find((one) => one.experts);
  if (!first) return [];
  return ["encoder", "decoder"].flatMap((side) =>
    first.experts[side].map((layer, index) => ({ side, index, name: `${side}, layer ${index + 1} of ${first.experts[side].length} with experts` })));
}

function tokenRow(pieces, layer) {
  const row = h("div", { className: "tokens", dir: "auto" });
  pieces.forEach((piece, number) => {
    const begins = piece.startsWith("▁");
    const node = h("span", { className: `token${begins ? " word" : ""}` }, begins ? piece.slice(1) || "␣" : piece);
    const experts = layer ? layer.experts[number] || [] : [], weights = layer ? layer.weights[number] || [] : [];
    if (!experts.length) {
      node.classList.add("plain");
      node.title = layer ? `${piece}: no expert` : piece;
    } else {
      const order = experts.map((expert, i) => [expert, weights[i]]).sort((a, b) => b[1] - a[1]);
      paint(node, order[0][0]);
      node.dataset.expert = order[0][0];
      if (!(order[0][1] > 0)) node.classList.add("dropped");
      node.title = `${piece}: ${order.map(([expert, weight]) => `expert ${expert} (${weight > 0 ? weight.toFixed(2) : "dropped"})`).join(", ")}`;
      node.append(h("sub", {}, String(order[0][0])));
    }
    row.append(node);
  });
  return row;
}

function legend(chosen) {
  const counts = new Map();
  for (const { experts } of translations) {
    if (!experts || !chosen) continue;
    for (const own of experts[chosen.side][chosen.index].experts) {
      for (const expert of own) counts.set(expert, (counts.get(expert) || 0) + 1);
    }
  }
  const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
  at("legend").replaceChildren(...[...counts].sort((a, b) => a[0] - b[0])
    .map(([expert, count]) => paint(h("span", {}, `expert ${expert}: ${(100 * count / total).toFixed(0)} %`), expert)));
}

function draw() {
  const all = layers(), chosen = all[Number(at("layer").value)];
  at("chooser").hidden = !all.length;
  at("name").textContent = chosen ? chosen.name : "";
  at("note").textContent = chosen
    ? "A token's colour and number are its first expert; point at it for all of them. Dashed: the expert was full and dropped it."
    : "This model has no layers with experts.";
  legend(chosen);
  at("sentences").replaceChildren(...translations.map((one) => {
    const article = h("article", {}, h("p", { className: "text", dir: "auto" }, one.text || "(empty)"));
    if (one.cut) article.append(h("p", { className: "hint" }, "The sentence was longer than the model's longest, and was truncated."));
    if (one.experts) {
      for (const [side, pieces, kind] of [["encoder", one.experts.source, "source"], ["decoder", one.experts.target, "translation"]]) {
        const layer = chosen && chosen.side === side ? one.experts[side][chosen.index] : null;
        article.append(h("div", { className: "kind" }, kind), tokenRow(pieces, layer));
      }
    }
    return article;
  }));
}

async function answer(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const content = await response.json();
  if (!response.ok) throw new Error([content.where, content.error, content.remedy].filter(Boolean).join(" · "));
  return content;
}

async function translate(event) {
  event.preventDefault();
  const sentences = at("text").value.split("\n").map((line) => line.trim()).filter(Boolean);
  if (!sentences.length) return say("Type a sentence.");
  at("go").disabled = true;
  say("");
  try {
    const body = JSON.stringify({ sentences, source: at("source").value, target: at("target").value, experts: true });
    translations = (await answer("translate", { method: "POST", headers: { "Content-Type": "application/json" }, body })).translations;
    at("layer").max = Math.max(layers().length - 1, 0);
    at("found").hidden = false;
    draw();
  } catch (error) {
    say(error.message);
  } finally {
    at("go").disabled = false;
  }
}

async function begin() {
  const about = await answer("health");
  at("about").textContent = `${about.model}, ${about.checkpoint}; trained: ${about.directions.join(", ")}`;
  at("limits").textContent = `at most ${about.limits.sentences} sentences of ${about.limits.characters} characters`;
  for (const id of ["source", "target"]) at(id).replaceChildren(...about.languages.map((code) => h("option", { value: code }, code)));
  const [source, target] = (about.directions[0] || about.languages.slice(0, 2).join("-")).split("-");
  at("source").value = source;
  at("target").value = target;
}

at("form").addEventListener("submit", translate);
at("layer").addEventListener("input", draw);
at("swap").addEventListener("click", () => {
  [at("source").value, at("target").value] = [at("target").value, at("source").value];
});
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
dark.addEventListener("change", draw);
begin().catch((error) => say(error.message));
