// What every page uses: elements, sections, colours, and Plotly charts that follow the reader's colour scheme.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#4269d0", "#e8a617", "#ff725c", "#3ca951", "#a463f2", "#38b2ac", "#ff8ab7", "#9c6b4e", "#97bbf5",
  "#8a919e", "#b5b231", "#d1495b"];
const colour = (index, count = COLOURS.length) =>
  count <= COLOURS.length ? COLOURS[index % COLOURS.length] : `hsl(${Math.round((360 * index) / count)} 62% 56%)`;
const DASHES = ["solid", "dash", "dot"];
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 40rem)");

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "style") Object.assign(element.style, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const content = document.getElementById("content");
const sections = document.getElementById("sections");
function link(id, title) {
  sections.append(h("a", { href: `#${id}` }, title));
}
function section(id, title, lead, parent = content) {
  const element = h("section", { id }, h("h2", {}, title), lead ? h("p", { class: "lead" }, lead) : null);
  parent.append(element);
  if (parent === content) link(id, title.split(": ")[0]);
  return element;
}

// Plotly reads markup in names and labels; what comes from a run folder is text.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const numbers = (values) => (values || []).filter((value) => typeof value === "number");
const units = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
function amount(value, digits = 3) {
  if (typeof value !== "number") return "–";
  for (const [limit, unit] of units) if (Math.abs(value) >= limit) return Number((value / limit).toPrecision(digits)) + unit;
  return String(Number(value.toPrecision(digits)));
}

function theme() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  return { page: get("--page"), text: get("--text"), quiet: get("--quiet"), line: get("--line"), raised: get("--raised") };
}
const heat = () => (dark.matches
  ? [[0, "#14171d"], [0.25, "#1f3a63"], [0.5, "#2f6fb3"], [0.75, "#6fb7d6"], [1, "#f4f1b2"]]
  : [[0, "#ffffff"], [0.25, "#d3e3f5"], [0.5, "#7fb0dd"], [0.75, "#2f6fb3"], [1, "#0c2c5c"]]);

function axis(colours, options = {}) {
  const { title, ...rest } = options;
  return {
    gridcolor: colours.line, linecolor: colours.line, zeroline: false, automargin: true, fixedrange: true,
    tickfont: { size: 11.5, color: colours.quiet }, ticks: "", nticks: narrow.matches ? 5 : 7,
    title: title ? { text: title, standoff: 8, font: { size: 12, color: colours.quiet } } : undefined, ...rest,
  };
}

const charts = new Map(); // element -> its builder; drawn when it comes near the screen
function paint(element) {
  const build = charts.get(element);
  if (!build || !element.isConnected) return;
  const colours = theme();
  const { traces, x, y, height, layout } = build(colours);
  element.style.height = `${height || 260}px`;
  Plotly.react(element, traces, {
    height: height || 260, margin: { l: 8, r: 12, t: 8, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colours.text }, showlegend: false, dragmode: false,
    hovermode: "closest", hoverdistance: 30,
    hoverlabel: { bgcolor: colours.raised, bordercolor: colours.line, font: { color: colours.text, size: 12.5 }, align: "left" },
    xaxis: axis(colours, x), yaxis: axis(colours, y), ...layout,
  }, { displayModeBar: false, responsive: true, doubleClick: false });
  element.dataset.drawn = "yes";
}
const observer = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { observer.unobserve(entry.target); paint(entry.target); }
}, { rootMargin: "600px" });
const redraw = () => { for (const element of charts.keys()) if (element.dataset.drawn) paint(element); };
dark.addEventListener("change", redraw);
narrow.addEventListener("change", redraw);
window.addEventListener("beforeprint", () => { for (const element of charts.keys()) paint(element); });

// A figure with its title and one line of explanation; `build(colours)` gives traces, axes and height.
function chart(parent, title, caption, build) {
  const element = h("div", { class: "chart", role: "img", "aria-label": `${title}. ${caption}` });
  parent.append(h("figure", {}, h("h3", {}, title), h("figcaption", {}, caption), element));
  charts.set(element, build);
  element.style.height = `${build(theme()).height || 260}px`; // nothing moves when it is drawn
  observer.observe(element);
}
function forget(parent) {
  for (const element of charts.keys()) {
    if (parent.contains(element)) { observer.unobserve(element); Plotly.purge(element); charts.delete(element); }
  }
  parent.replaceChildren();
}
function line(name, x, y, style = {}, format = {}) {
  return {
    type: "scatter", mode: x.length < 30 ? "lines+markers" : "lines", name: plain(name), x, y, connectgaps: true,
    marker: { size: 5, color: style.color }, line: { width: 1.8, ...style },
    hovertemplate: `%{fullData.name}<br>${format.x || "%{x:,}"} ${format.xUnit || ""}<br>${format.y || "%{y:.4~g}"} ${format.yUnit || ""}<extra></extra>`,
  };
}
function scale(parent, low, middle, high, text) {
  const stops = heat().map(([at, value]) => `${value} ${at * 100}%`).join(",");
  const bar = h("i", { style: { background: `linear-gradient(90deg,${stops})`, border: "1px solid var(--line)" } });
  dark.addEventListener("change", () => {
    bar.style.background = `linear-gradient(90deg,${heat().map(([at, value]) => `${value} ${at * 100}%`).join(",")})`;
  });
  parent.append(h("div", { class: "scale" }, h("span", {}, low), bar, h("span", {}, high), h("span", {}, text || middle)));
}
function key(parent, entries) {
  const items = entries.map(([name, value]) => h("span", {}, h("span", { class: "dot", style: { background: value } }), name));
  parent.append(h("div", { class: "experts" }, ...items));
}

// The coloured names of runs, which hide or show their run in all charts.
const hidden = new Set();
function legend(names) {
  const holder = document.getElementById("legend");
  names.forEach((name, index) => {
    const button = h("button", { class: "run", type: "button", "aria-pressed": "true" },
      h("span", { class: "dot", style: { background: colour(index) } }), name);
    button.addEventListener("click", () => {
      if (hidden.has(index)) hidden.delete(index); else hidden.add(index);
      button.setAttribute("aria-pressed", String(!hidden.has(index)));
      redraw();
    });
    holder.append(button);
  });
}
