"use strict";
// Table of cases, filters, and the dialog of one case. Texts enter the page by textContent only.

const PAGE = 50;
const COLOUR = { predicted: "#e69f00", gold: "#56b4e9" };
const find = (id) => document.getElementById(id);
const form = find("filters"), dialog = find("case"), rows = find("cases-table").tBodies[0];
let all = [], dense = null, labels = {}, found = [], start = 0, open = -1, pictures = null, masks = 0;

function element(tag, content = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = content;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

async function unpack() {
  const bytes = Uint8Array.from(atob(find("block").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const verdictOf = (condition) =>
  !condition ? "" : condition.correct ? "right" : condition.answer || condition.correct === null ? "wrong" : "no answer";

function badge(condition) {
  const verdict = verdictOf(condition);
  return verdict ? element("span", verdict, { class: `verdict ${verdict === "right" ? "right" : ""}` }) : element("span", "–");
}

const percent = (value) => (value === undefined || value === null ? "–" : `${(100 * value).toFixed(1)}%`);
const decimal = (value) => (value === undefined || value === null ? "–" : value.toFixed(2));

// --- table ------------------------------------------------------------------

function wanted(one, asked) {
  const { sparse } = one.conditions, other = dense && one.conditions[dense];
  if (asked.verdict && verdictOf(sparse) !== asked.verdict) return false;
  if (asked.template && one.template !== asked.template) return false;
  if (asked.dataset && one.dataset !== asked.dataset) return false;
  if (asked.fallback && !(sparse && sparse.fallback)) return false;
  if (asked.low && !(sparse && 100 * sparse.kept >= Number(asked.low))) return false;
  if (asked.high && !(sparse && 100 * sparse.kept <= Number(asked.high))) return false;
  if (asked.pair) {
    if (!sparse || !other) return false;
    if (asked.pair === "differ" && sparse.answer === other.answer) return false;
    if (asked.pair === "gained" && !(sparse.correct && !other.correct)) return false;
    if (asked.pair === "lost" && !(other.correct && !sparse.correct)) return false;
  }
  return !asked.search || one.words.includes(asked.search.toLowerCase());
}

const KEYS = {
  kept: (one) => one.conditions.sparse?.kept ?? 2,
  iou: (one) => one.conditions.localization?.iou ?? 2,
};

function filter() {
  const asked = Object.fromEntries(new FormData(form));
  found = all.filter((one) => wanted(one, asked));
  const key = KEYS[asked.order];
  if (key) found.sort((a, b) => key(a) - key(b));
  start = 0;
  show();
}

function show() {
  rows.replaceChildren(...found.slice(start, start + PAGE).map(row));
  const end = Math.min(start + PAGE, found.length);
  find("shown").textContent = found.length
    ? `${start + 1}–${end} of ${found.length.toLocaleString("en")} (${all.length.toLocaleString("en")} cases)`
    : `No case fits (${all.length.toLocaleString("en")} cases)`;
  find("before").disabled = start === 0;
  find("after").disabled = end === found.length;
}

function row(one, index) {
  const line = document.createElement("tr");
  const { sparse, localization } = one.conditions;
  const button = element("button", one.question.split("\n")[0], { type: "button", title: one.id });
  button.addEventListener("click", () => openCase(start + index));
  const cell = (content, kind = "") => {
    const made = element("td", "", { class: kind });
    made.append(content);
    line.append(made);
  };
  cell(button);
  cell(one.template, "wide");
  cell(one.gold, "wide");
  cell(badge(sparse));
  if (dense) cell(badge(one.conditions[dense]));
  cell(percent(sparse?.kept) + (sparse?.fallback ? " (fell back)" : ""), "wide");
  cell(decimal(localization?.iou), "wide");
  return line;
}

// --- one case ---------------------------------------------------------------

function drawn(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function seen(one, mask) {
  // The cells that were kept, [x1, y1, x2, y2] in 0..1: of the first view that covers what the model was shown, or of all.
  const bits = atob(mask), [sx1, sy1, sx2, sy2] = one.shown, views = [];
  let token = 0;
  for (const [x1, y1, x2, y2, lines, columns] of one.grid) {
    const cells = [];
    for (let i = 0; i < lines * columns; i++, token++) {
      if (!((bits.charCodeAt(token >> 3) >> (7 - (token & 7))) & 1)) continue;
      const r = Math.floor(i / columns), c = i % columns, w = (x2 - x1) / columns, h = (y2 - y1) / lines;
      cells.push([x1 + c * w, y1 + r * h, x1 + (c + 1) * w, y1 + (r + 1) * h]);
    }
    if (x1 <= sx1 && y1 <= sy1 && x2 >= sx2 && y2 >= sy2) return cells;
    views.push(...cells);
  }
  return views;
}

const area = ([x1, y1, x2, y2], height) => `M${1000 * x1} ${height * y1}H${1000 * x2}V${height * y2}H${1000 * x1}Z`;

function picture(one, size, title, { mask, boxes = [], gold = [] }) {
  const height = (1000 * size.height) / size.width;
  const svg = drawn("svg", { viewBox: `0 0 1000 ${height}`, role: "img", "aria-label": title });
  if (Math.min(size.width, size.height) < 256) svg.classList.add("small");
  svg.append(drawn("image", { href: size.src, width: 1000, height, preserveAspectRatio: "none" }));
  if (mask) {
    const id = `mask${masks++}`, hole = drawn("mask", { id, maskUnits: "userSpaceOnUse", x: 0, y: 0, width: 1000, height });
    const cells = seen(one, mask).map((cell) => area(cell, height)).join("");
    hole.append(drawn("rect", { width: 1000, height, fill: "#fff" }), drawn("path", { d: cells, fill: "#000" }));
    svg.append(hole, drawn("rect", { width: 1000, height, fill: "#12182c", opacity: 0.66, mask: `url(#${id})` }));
    svg.append(drawn("path", { d: cells, fill: "none", stroke: "#fff", "stroke-opacity": 0.3, "stroke-width": 2 }));
  }
  for (const [list, stroke, dash] of [[boxes, COLOUR.predicted, ""], [gold, COLOUR.gold, "26 16"]])
    for (const box of list) {
      const d = area(box, height);
      svg.append(drawn("path", { d, fill: "none", stroke: "#000", "stroke-opacity": 0.6, "stroke-width": 16 }));
      svg.append(drawn("path", { d, fill: "none", stroke, "stroke-width": 9, "stroke-dasharray": dash }));
    }
  return svg;
}

function card(one, size, name, condition) {
  const made = element("section", "", { class: "answer" });
  const label = name === "gold" ? "Gold" : labels[name] || name;
  made.append(element("h3", label));
  const tokens = one.grid.reduce((sum, view) => sum + view[4] * view[5], 0);
  const parts = condition ? { mask: condition.mask, boxes: condition.boxes } : { gold: one.gold_boxes };
  if (name === "sparse") parts.boxes = one.conditions.localization?.boxes;
  const what = condition?.mask ? `${condition.count} of ${tokens} tokens kept` : "all tokens";
  made.append(picture(one, size, `${label}: ${what}, ${(parts.boxes || parts.gold || []).length} boxes`, parts));
  if (!condition) {
    made.append(element("p", one.gold || "–"));
    return made;
  }
  const facts = [what];
  if (condition.fallback) facts.push("fell back to all tokens");
  if (condition.parsed === false) facts.push("boxes did not parse");
  for (const grade of ["score", "judge"])
    if (grade in condition) facts.push(`${grade} ${decimal(condition[grade])}`);
  if (typeof condition.iou === "number") facts.push(`IoU ${decimal(condition.iou)}`);
  const written = condition.written ? `could not be read: ${condition.written}` : "";
  const answer = element("p", `${condition.answer || written} `);
  answer.append(badge(condition));
  made.append(answer);
  made.append(element("p", facts.join(" · "), { class: "soft" }));
  if (condition.thought) made.append(element("p", condition.thought, { class: "thought" }));
  return made;
}

async function measured(number) {
  pictures ??= JSON.parse(find("pictures").textContent);
  const image = new Image();
  image.src = pictures[number];
  try {
    await image.decode();
    return { src: image.src, width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return { src: "", width: 4, height: 3 };
  }
}

async function openCase(index) {
  open = index;
  const one = found[index], size = await measured(one.picture);
  if (open !== index) return;
  find("case-title").textContent = [one.id, one.template, form.elements.dataset && one.dataset].filter(Boolean).join(" · ");
  find("case-question").textContent = size.src ? one.question : `${one.question}\n(The picture is not beside this file.)`;
  const names = [dense, "sparse", "random"].filter((name) => one.conditions[name]);
  const rest = Object.keys(one.conditions).filter((name) => !names.includes(name));
  const cards = (list) => list.map((name) => card(one, size, name, one.conditions[name]));
  find("case-answers").replaceChildren(card(one, size, "gold", null), ...cards(names));
  find("case-more").hidden = !rest.length;
  find("case-more").lastElementChild.replaceChildren(...cards(rest));
  find("earlier").disabled = index === 0;
  find("later").disabled = index === found.length - 1;
  history.replaceState(null, "", `#case=${encodeURIComponent(one.number)}`);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

const move = (by) => open + by >= 0 && open + by < found.length && openCase(open + by);

dialog.addEventListener("close", () => {
  history.replaceState(null, "", "#cases");
  start = PAGE * Math.floor(open / PAGE);
  show();
  rows.rows[open - start]?.querySelector("button").focus();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
find("close").addEventListener("click", () => dialog.close());
find("earlier").addEventListener("click", () => move(-1));
find("later").addEventListener("click", () => move(1));
find("before").addEventListener("click", () => ((start -= PAGE), show()));
find("after").addEventListener("click", () => ((start += PAGE), show()));
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (dialog.open) {
    if (event.key === "ArrowLeft") move(-1);
    if (event.key === "ArrowRight") move(1);
    return;
  }
  if (event.key === "/" && !event.target.closest("input, select")) {
    event.preventDefault();
    form.elements.search.focus();
  }
  const line = event.target.closest?.("#cases-table tbody tr");
  const next = line && { ArrowDown: line.nextElementSibling, ArrowUp: line.previousElementSibling }[event.key];
  if (next) {
    event.preventDefault();
    next.querySelector("button").focus();
  }
});

// After the first paint: thousands of cases take a moment to unpack.
requestAnimationFrame(() =>
  setTimeout(async () => {
    try {
      const data = await unpack();
      ({ dense, labels } = data);
      all = data.cases;
    } catch (error) {
      find("shown").textContent = `This browser cannot open the cases (${error.message}); they are in cases.jsonl as well.`;
      return;
    }
    all.forEach((one, index) => {
      one.number = index + 1;
      one.words = [one.id, one.question, one.gold, ...Object.values(one.conditions).map((c) => c.answer)].join("\n").toLowerCase();
    });
    filter();
    const asked = /^#case=(\d+)$/.exec(location.hash);
    if (asked && all[asked[1] - 1]) openCase(asked[1] - 1);
  }),
);
