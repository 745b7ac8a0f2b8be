// What the mouse does on the pictures. Dragging over the preview draws a box: it becomes the two clicks, on opposite
// corners, that the page understands. A box that is there can be moved and resized by dragging, and is deleted by a
// double click; Alt draws inside of one. Dragging with the right button changes the window. Ctrl + wheel (or a pinch)
// zooms all pictures together, and Shift + dragging moves them. Thumbnails move the slider of pictures, and the address
// becomes the link to the view.
() => {
  const PICTURES = "#preview img, #sparse img, #dense img, #random img";
  const NEAR = 8;  // pixels from an edge that still take hold of it
  const find = (selector) => document.querySelector(selector);
  const preview = (event) => event.target.closest?.("#preview")?.querySelector("img");
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const inside = (event, r) => ({
    clientX: clamp(event.clientX, r.left, r.right - 1), clientY: clamp(event.clientY, r.top, r.bottom - 1),
  });
  let drag = null, band = null, swallow = false;

  // --- boxes, as lines of the field "Your boxes" ---
  const lines = () => (find("#boxes textarea")?.value || "").split("\n").filter((line) => line.trim());
  // Of several pictures, a line begins with the number of its own; without one it belongs to the picture on the page.
  const shownNumber = () => find("#preview-heading [data-number]")?.dataset.number;
  const split = (line) => (line.includes(":") ? line.split(":", 2) : [shownNumber(), line]);
  const numbers = (line) => split(line)[1].split(/[\s,;[\]]+/).filter(Boolean).map(Number);
  const here = (line) => !shownNumber() || Number(split(line)[0]) === Number(shownNumber());
  const fill = (field, value) => {
    field.value = value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const write = (changed) => {
    fill(find("#boxes textarea"), changed.join("\n"));
    setTimeout(() => find("#ask").click(), 150);  // after the field has told the page
  };
  const hit = (event, img) => {
    const r = img.getBoundingClientRect();
    for (const [index, line] of [...lines().entries()].reverse()) {
      const box = here(line) ? numbers(line) : [];
      if (box.length !== 4 || box.some((value) => !(value >= 0 && value <= 1))) continue;
      const [x1, y1, x2, y2] = box.map((value, i) => (i % 2 ? r.top + value * r.height : r.left + value * r.width));
      const { clientX: x, clientY: y } = event;
      if (x < x1 - NEAR || x > x2 + NEAR || y < y1 - NEAR || y > y2 + NEAR) continue;
      const near = (a, b) => Math.abs(a - b) <= NEAR;
      // Edges that the pointer holds, as places in the box: x1, y1, x2, y2. None: the whole box moves.
      const held = [near(x, x1) ? 0 : near(x, x2) ? 2 : -1, near(y, y1) ? 1 : near(y, y2) ? 3 : -1].filter((i) => i >= 0);
      return { index, box, held };
    }
    return null;
  };
  const edited = ({ box, held, img, clientX, clientY }, event) => {
    const r = img.getBoundingClientRect();
    const by = [(event.clientX - clientX) / r.width, (event.clientY - clientY) / r.height];
    if (!held.length) {
      const [dx, dy] = [clamp(by[0], -box[0], 1 - box[2]), clamp(by[1], -box[1], 1 - box[3])];
      return [box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy];
    }
    const moved = [...box];
    for (const i of held) moved[i] = clamp(box[i] + by[i % 2], i < 2 ? 0 : box[i - 2] + 0.01, i < 2 ? box[i + 2] - 0.01 : 1);
    return moved;
  };
  const frame = (left, top, width, height) => {
    if (!band) document.body.append((band = Object.assign(document.createElement("div"), { className: "band" })));
    Object.assign(band.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
  };

  // --- zoom, the same for all pictures ---
  let zoom = { k: 1, x: 0, y: 0 };
  const apply = () => {
    zoom.x = clamp(zoom.x, 1 - zoom.k, 0);
    zoom.y = clamp(zoom.y, 1 - zoom.k, 0);
    const { k, x, y } = zoom;
    document.documentElement.style.setProperty("--zoom", k === 1 ? "none" : `translate(${100 * x}%, ${100 * y}%) scale(${k})`);
  };
  document.addEventListener("wheel", (event) => {
    const img = event.ctrlKey && event.target.closest?.(PICTURES);
    if (!img) return;
    event.preventDefault();
    const r = img.getBoundingClientRect(), k = clamp(zoom.k * Math.exp(-event.deltaY / 300), 1, 12);
    const [u, w] = [(event.clientX - r.left) / r.width, (event.clientY - r.top) / r.height];
    zoom = { k, x: zoom.x + u * (zoom.k - k), y: zoom.y + w * (zoom.k - k) };
    apply();
  }, { passive: false });
  document.addEventListener("change", (event) => {
    if (event.target.closest?.("#file")) { zoom = { k: 1, x: 0, y: 0 }; apply(); }
  });

  // --- one drag: pan, window, an edited box or a new one ---
  const begin = (event) => {
    const any = event.target.closest?.(PICTURES), img = preview(event);
    const at = { clientX: event.clientX, clientY: event.clientY };
    if (event.button === 0 && event.shiftKey && any) return { kind: "pan", img: any, ...at, from: { ...zoom } };
    if (event.pointerType === "touch" || !img) return null;
    const fields = ["#centre", "#width"].map((id) => find(`${id} input[type=number]`));
    if (event.button === 2) {
      const ranges = ["#centre", "#width"].map((id) => find(`${id} input[type=range]`));
      if (!fields.every((field) => field?.checkVisibility())) return null;
      const steps = ranges.map((range) => (range.max - range.min) / 400);
      return { kind: "window", img, ...at, fields, steps, from: fields.map((field) => Number(field.value)) };
    }
    const found = !event.altKey && hit(event, img);
    return event.button === 0 ? (found ? { kind: "edit", img, ...at, ...found } : { kind: "draw", img, ...at }) : null;
  };
  const moves = {
    pan(event) {
      const r = drag.img.getBoundingClientRect();
      zoom.x = drag.from.x + (zoom.k * (event.clientX - drag.clientX)) / r.width;
      zoom.y = drag.from.y + (zoom.k * (event.clientY - drag.clientY)) / r.height;
      apply();
    },
    window(event) {
      const by = [event.clientY - drag.clientY, event.clientX - drag.clientX];
      drag.fields.forEach((field, i) => fill(field, String(Math.round(drag.from[i] + by[i] * drag.steps[i]))));
    },
    edit(event) {
      const r = drag.img.getBoundingClientRect();
      drag.to = edited(drag, event);
      const [x1, y1, x2, y2] = drag.to;
      frame(r.left + x1 * r.width, r.top + y1 * r.height, (x2 - x1) * r.width, (y2 - y1) * r.height);
    },
    draw(event) {
      const end = inside(event, drag.img.getBoundingClientRect());
      const [w, h] = [Math.abs(end.clientX - drag.clientX), Math.abs(end.clientY - drag.clientY)];
      if (!band && Math.max(w, h) < 6) return;
      frame(Math.min(end.clientX, drag.clientX), Math.min(end.clientY, drag.clientY), w, h);
    },
  };
  const stop = () => { band?.remove(); drag = band = null; };
  document.addEventListener("dragstart", (event) => { if (preview(event)) event.preventDefault(); });
  document.addEventListener("contextmenu", (event) => { if (preview(event) && find("#width")?.checkVisibility()) event.preventDefault(); });
  document.addEventListener("pointerdown", (event) => {
    swallow = false;
    drag = begin(event);
    if (drag && drag.kind !== "draw") swallow = event.button === 0;
  });
  document.addEventListener("pointermove", (event) => {
    if (drag) return moves[drag.kind](event);
    const img = preview(event), found = img && hit(event, img);
    if (img) img.style.cursor = !found ? "" : !found.held.length ? "move" : found.held.length === 1
      ? (found.held[0] % 2 ? "ns-resize" : "ew-resize") : (found.held[0] + found.held[1]) % 4 === 1 ? "nwse-resize" : "nesw-resize";
  });
  document.addEventListener("pointerup", (event) => {
    if (drag?.kind === "draw" && band) {
      swallow = true;  // the browser's own click at the end of the drag
      for (const { clientX, clientY } of [drag, inside(event, drag.img.getBoundingClientRect())])
        drag.img.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX, clientY }));
    }
    if (drag?.kind === "edit" && drag.to) {
      const changed = lines();
      const edges = drag.to.map((value) => Number(value.toFixed(3))).join(", ");
      changed[drag.index] = shownNumber() ? `${shownNumber()}: ${edges}` : edges;
      write(changed);
    }
    stop();
  });
  document.addEventListener("pointercancel", stop);
  document.addEventListener("dblclick", (event) => {
    const img = preview(event), found = img && hit(event, img);
    if (found) write(lines().filter((_, index) => index !== found.index));
  });
  // --- thumbnails and the address ---
  document.addEventListener("click", (event) => {
    const thumb = event.target.closest?.(".thumb");
    if (thumb) fill(find("#frame input[type=range]"), thumb.dataset.place);
  });
  new MutationObserver(() => {
    const place = find("#preview-heading [data-place]")?.dataset.place;
    for (const thumb of document.querySelectorAll(".thumb")) {
      const pressed = String(thumb.dataset.place === place);
      if (thumb.getAttribute("aria-pressed") !== pressed) thumb.setAttribute("aria-pressed", pressed);
    }
    // Gradio labels an empty picture without a role, which screen readers skip, and the button for files otherwise than
    // by its text, which speech control listens for.
    for (const empty of document.querySelectorAll(".empty[aria-label]:not([role])")) empty.setAttribute("role", "img");
    find("button.upload-container[aria-label]")?.removeAttribute("aria-label");
    const view = find("#link")?.getAttribute("href");
    if (view && view !== window.location.search) window.history.replaceState(window.history.state, "", view);
  }).observe(document.body, { childList: true, subtree: true });

  document.addEventListener("click", (event) => {
    if (event.target.closest?.(".example")) { zoom = { k: 1, x: 0, y: 0 }; apply(); }
    if (swallow && event.isTrusted && event.target.closest?.(PICTURES)) event.stopPropagation();
    if (event.isTrusted) swallow = false;
  }, true);
}
