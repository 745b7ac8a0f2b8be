// Dragging over the image draws a box: it becomes the two clicks, on opposite corners, that the page understands.
() => {
  let start = null, band = null, swallow = false;
  const image = (event) => event.target.closest?.("#preview")?.querySelector("img");
  const inside = (event, r) => ({
    clientX: Math.min(Math.max(event.clientX, r.left), r.right - 1),
    clientY: Math.min(Math.max(event.clientY, r.top), r.bottom - 1),
  });
  const stop = () => { band?.remove(); start = band = null; };
  document.addEventListener("dragstart", (event) => { if (image(event)) event.preventDefault(); });
  document.addEventListener("pointerdown", (event) => {
    swallow = false;
    const img = event.button === 0 && event.pointerType !== "touch" && image(event);
    if (img) start = { img, clientX: event.clientX, clientY: event.clientY };
  });
  document.addEventListener("pointermove", (event) => {
    if (!start) return;
    const end = inside(event, start.img.getBoundingClientRect());
    const [w, h] = [Math.abs(end.clientX - start.clientX), Math.abs(end.clientY - start.clientY)];
    if (!band && Math.max(w, h) < 6) return;
    if (!band) document.body.append((band = Object.assign(document.createElement("div"), { className: "band" })));
    Object.assign(band.style, {
      left: `${Math.min(end.clientX, start.clientX)}px`, top: `${Math.min(end.clientY, start.clientY)}px`,
      width: `${w}px`, height: `${h}px`,
    });
  });
  document.addEventListener("pointerup", (event) => {
    if (start && band) {
      swallow = true;  // the browser's own click at the end of the drag
      for (const corner of [start, inside(event, start.img.getBoundingClientRect())]) {
        const { clientX, clientY } = corner;
        start.img.dispatchEvent(new MouseEvent("click", { bubbles: true, clientX, clientY }));
      }
    }
    stop();
  });
  document.addEventListener("pointercancel", stop);
  document.addEventListener("click", (event) => {
    if (swallow && event.isTrusted) event.stopPropagation();
    if (event.isTrusted) swallow = false;
  }, true);
}
