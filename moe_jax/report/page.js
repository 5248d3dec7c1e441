// The heat map, the token view and the table of experts, of the run and layer that are chosen.
// It reads the JSON that inside.py made. All text goes in as textContent, never as HTML.
"use strict";
(() => {
const runs = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
if (!runs.length) return;
let run = runs[0], z = 0, only = -1;

function make(parent, tag, text, kind) {
  const node = parent.appendChild(document.createElement(tag));
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
}

// Expert colours: up to 16 hues, then the same hues in another lightness.
function paint(node, expert, count) {
  const hues = count <= 8 ? count : count <= 32 ? 8 : 16;
  node.classList.add("e", "l" + Math.floor(expert / hues) % 4);
  node.style.setProperty("--h", 25 + 360 * (expert % hues) / hues);
}

const tip = $("tip");
function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x, innerWidth - box.width - 6)) + "px";
  tip.style.top = (y + box.height + 8 > innerHeight ? y - box.height - 26 : y + 6) + "px";
}
function hideTip() { tip.hidden = true; }

// --- load over training: experts down, steps across ---
const map = $("map"), left = 30, top = 5, bottom = 18;
let grid = null;
function variable(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}
function drawMap() {
  $("heat").hidden = !run.heat.steps;
  grid = null;
  if (!run.heat.steps) return;
  const rows = run.heat.load_ZES[z], steps = run.heat.steps, ratio = devicePixelRatio || 1;
  const width = map.clientWidth, height = map.clientHeight;
  map.width = width * ratio;
  map.height = height * ratio;
  const pen = map.getContext("2d"),
    [low, mid, high] = ["--low", "--mid", "--high"].map(n => variable(n).match(/\d+/g).map(Number));
  pen.scale(ratio, ratio);
  const w = (width - left) / steps.length, h = (height - top - bottom) / rows.length;
  rows.forEach((row, e) => row.forEach((load, s) => {
    const x = Math.min(load ?? 0, 200) / 100, a = x < 1 ? low : mid, b = x < 1 ? mid : high;
    const c = a.map((v, i) => Math.round(v + (b[i] - v) * (x < 1 ? x : x - 1)));
    pen.fillStyle = `rgb(${c})`;
    pen.fillRect(left + s * w, top + e * h, w + .6, h > 5 ? h - 1 : h + .6);
  }));
  pen.fillStyle = variable("--muted");
  pen.font = "11px system-ui, sans-serif";
  const every = Math.ceil(rows.length * 14 / (height - top - bottom));
  pen.textAlign = "right";
  for (let e = 0; e < rows.length; e += every) pen.fillText(e, left - 6, top + (e + .5) * h + 4);
  pen.textAlign = "center";
  for (let i = 0; i < 5; i++) {
    const s = Math.round((steps.length - 1) * i / 4), x = left + (s + .5) * w;
    pen.fillText(steps[s], Math.min(Math.max(x, left + 6), width - 18), height - 4);
  }
  grid = {rows, steps, w, h};
  const now = rows.map((row, e) => [row[row.length - 1] / 100, e]).sort((a, b) => a[0] - b[0]);
  const [least, most] = [now[0], now[now.length - 1]];
  $("heat-note").textContent = `Experts down, steps across. At step ${steps[steps.length - 1]} ` +
    `expert ${most[1]} has ${most[0].toFixed(2)}x its fair share, ` +
    `expert ${least[1]} ${least[0].toFixed(2)}x.`;
}
map.addEventListener("pointermove", event => {
  if (!grid) return;
  const s = Math.floor((event.offsetX - left) / grid.w), e = Math.floor((event.offsetY - top) / grid.h);
  const load = grid.rows[e]?.[s];
  if (load === undefined) return hideTip();
  showTip(`expert ${e}, step ${grid.steps[s]}: ${(load / 100).toFixed(2)}x fair share`,
    event.clientX + 8, event.clientY + 8);
});
map.addEventListener("pointerleave", hideTip);

// --- the text ---
function shown(token) {
  if (token === "\n" || token === "\r\n") return "↵\n";
  return token.replace(/\t/g, "→\t").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, "·") || "·";
}
function describe(token, i, layer) {
  const experts = layer.experts[i] || [];
  const lines = experts.map((e, k) => {
    const gate = (layer.gates[i][k] ?? 0).toFixed(3);
    return `expert ${e}: gate ${gate}${layer.kept[i][k] ? "" : ", dropped"}`;
  });
  return [JSON.stringify(token), ...(lines.length ? lines : ["no expert chose it"])].join("\n");
}
function drawText() {
  const view = $("text"), legend = $("legend"), text = run.text, layer = text.layers?.[z];
  view.replaceChildren();
  legend.replaceChildren();
  view.hidden = legend.hidden = !layer;
  if (!layer) {
    $("text-note").textContent = "This run has no routing.json: eval.py --routing writes it.";
    return;
  }
  const listed = Math.max(...layer.experts.flat()) + 1;
  const experts = Math.max(listed, run.heat.load_ZES?.[z].length ?? 0);
  const counts = Array(experts).fill(0);
  let lost = 0, domain;
  text.tokens.forEach((token, i) => {
    if (text.domain[i] !== domain) {
      domain = text.domain[i];
      if (domain) make(view, "b", domain);
    }
    const kept = layer.kept[i] || [], best = kept.findIndex(Boolean);
    const node = make(view, "span", shown(token), "tok");
    node.dataset.i = i;
    node.tabIndex = i ? -1 : 0;
    if (best < 0) {
      lost++;
      node.classList.add("none");
      return;
    }
    const expert = layer.experts[i][best];
    counts[expert]++;
    node.dataset.e = expert;
    paint(node, expert, experts);
    if (kept.includes(false)) node.classList.add("part");
  });
  $("text-note").textContent = `${text.tokens.length} tokens. Colour: the best expert ` +
    `that took the token, with its share. Struck through: no expert took it (${lost}). ` +
    "Line above: an expert dropped it.";
  counts.forEach((count, e) => {
    const share = Math.round(100 * count / text.tokens.length);
    const button = make(legend, "button", `${experts > 24 ? "" : "expert "}${e}: ${share}%`);
    button.type = "button";
    paint(button, e, experts);
    button.setAttribute("aria-pressed", e === only);
    button.onclick = () => { only = only === e ? -1 : e; drawText(); legend.children[e].focus(); };
    if (only >= 0 && only !== e) button.classList.add("dim");
  });
  if (only >= 0)
    for (const node of view.querySelectorAll(".tok"))
      if (node.dataset.e !== String(only)) node.classList.add("dim");
}
function tokenTip(node) {
  const i = Number(node.dataset.i), box = node.getClientRects()[0];
  node.setAttribute("aria-describedby", "tip");
  showTip(describe(run.text.tokens[i], i, run.text.layers[z]), box.left, box.bottom);
}
for (const kind of ["pointerover", "focusin"])
  $("text").addEventListener(kind, event => {
    const node = event.target.closest(".tok");
    if (node) tokenTip(node);
  });
for (const kind of ["pointerleave", "focusout", "scroll"])
  $("text").addEventListener(kind, hideTip);
$("text").addEventListener("keydown", event => {
  const move = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20}[event.key];
  const node = event.target.closest(".tok");
  if (event.key === "Escape") hideTip();
  if (!move || !node) return;
  event.preventDefault();
  const all = $("text").querySelectorAll(".tok");
  const next = all[Math.min(Math.max(Number(node.dataset.i) + move, 0), all.length - 1)];
  node.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});

// --- the experts: domains and favourite tokens ---
function drawExperts() {
  const loads = run.domain_load_ZGE[z] || [], top = run.top_tokens_ZE[z] || [];
  const table = $("experts"), domains = loads.length ? run.domains : [];
  const count = loads[0]?.length ?? top.length;
  table.replaceChildren();
  table.parentNode.previousElementSibling.hidden = !count;
  if (!count) return;
  const head = make(make(table, "thead"), "tr"), body = make(table, "tbody");
  make(head, "th", "expert");
  for (const domain of domains) make(head, "th", `${domain}, x fair share`, "n");
  if (top.length) make(head, "th", "tokens it takes more often than others do");
  for (let e = 0; e < count; e++) {
    const row = make(body, "tr");
    make(row, "td", e);
    for (const load of loads) make(row, "td", (load[e] * count).toFixed(2), "n");
    if (top.length) make(row, "td", (top[e] || []).map(t => JSON.stringify(t[0])).join("  "));
  }
}

// --- which run, which layer ---
function drawLayers() {
  const group = $("layers");
  group.replaceChildren("Layer");
  run.layers.forEach((layer, i) => {
    const button = make(group, "button", layer);
    button.type = "button";
    button.setAttribute("aria-pressed", i === z);
    button.onclick = () => { z = i; draw(); group.querySelectorAll("button")[i].focus(); };
  });
}
function draw() {
  z = Math.min(z, Math.max(run.layers.length - 1, 0));
  hideTip();
  drawLayers();
  drawMap();
  drawText();
  drawExperts();
}
runs.forEach((each, i) => { make($("run"), "option", each.label).value = i; });
$("run").onchange = event => { run = runs[event.target.value]; only = -1; draw(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
addEventListener("resize", drawMap);
draw();
})();
