"use strict";
// Markers tell their numbers and light up the rows of the tables, and rows light up their markers. Without a script the tables say it all.
(() => {
  const data = JSON.parse(document.getElementById("frontier-data").textContent);
  const every = [...data.points, ...data.baseline_topk, ...(data.baseline_bits || [])];
  const points = new Map(every.map((point) => [point.name, point]));
  const full = Math.max(...every.map((point) => point.active_expert_bytes));
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;

  function words(point) {
    const lines = [
      "KL " + (point.kl < 1e-6 ? "0" : point.kl.toPrecision(3)) + " nats per token",
      (100 * point.top1_agreement).toFixed(1) + " % same next token",
      (100 * point.active_expert_bytes / full).toFixed(1) + " % of the expert bytes",
    ];
    if (point.time) lines.push(point.time.ms_per_token.toFixed(2) + " ms per token, " + point.time.of_stock.toFixed(2) + " of stock");
    if (point.resident_expert_bytes) lines.push((point.resident_expert_bytes / 1e6).toFixed(1) + " MB of experts in memory");
    const worst = Object.entries(point.domains || {}).sort((a, b) => b[1].kl - a[1].kl)[0];
    if (worst) lines.push("worst domain " + worst[0] + ": KL " + worst[1].kl.toPrecision(3));
    const slice = Object.entries(point.slices || {}).filter(([, found]) => found.is_ability).sort((a, b) => a[1].kept - b[1].kept)[0];
    if (slice) lines.push("worst slice " + slice[0] + ": keeps " + (100 * slice[1].kept).toFixed(1) + " %");
    return lines;
  }

  function element(tag, text) {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  }

  function light(name, on) {
    for (const found of document.querySelectorAll(".mark, tr[data-point]"))
      if ((found.dataset.point || found.getAttribute("aria-label")) === name) found.classList.toggle("on", on);
  }

  function show(mark) {
    const point = points.get(mark.getAttribute("aria-label")), figure = mark.closest("figure");
    tip.replaceChildren(element("b", point.name), ...words(point).map((line) => element("span", line)));
    figure.append(tip);
    tip.hidden = false;
    const frame = figure.getBoundingClientRect(), at = mark.getBoundingClientRect();
    const left = at.left - frame.left + at.width + 8, top = at.top - frame.top + at.height + 8;
    tip.style.left = Math.max(4, Math.min(left, frame.width - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(top, frame.height - tip.offsetHeight - 8)) + "px";
    light(point.name, true);
  }

  function hide(mark) {
    tip.hidden = true;
    light(mark.getAttribute("aria-label"), false);
  }

  for (const mark of document.querySelectorAll("figure path[aria-label]")) {
    if (!points.has(mark.getAttribute("aria-label"))) continue;
    mark.classList.add("mark");
    mark.addEventListener("pointerenter", () => show(mark));
    mark.addEventListener("pointerleave", () => hide(mark));
    mark.addEventListener("click", () => show(mark));
  }
  for (const row of document.querySelectorAll("tr[data-point]")) {
    row.addEventListener("pointerenter", () => light(row.dataset.point, true));
    row.addEventListener("pointerleave", () => light(row.dataset.point, false));
  }
})();
