"use strict";
// Values under the pointer. Without this script the page shows the same, and every plot has its numbers as a table.
(() => {
  const tip = document.getElementById("tip");

  const show = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    const left = Math.min(x + 14, window.innerWidth - tip.offsetWidth - 8);
    const below = y + 18 + tip.offsetHeight < window.innerHeight;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${below ? y + 18 : y - 12 - tip.offsetHeight}px`;
  };
  const hide = () => { tip.hidden = true; };
  const numbers = (text) => (text ? text.split(" ").map(Number) : []);

  document.addEventListener("pointermove", (event) => {
    if (event.target.closest(".lines")) return;
    const marked = event.target.closest("[data-tip]");
    if (marked) show(marked.dataset.tip, event.clientX, event.clientY);
    else hide();
  });

  for (const plot of document.querySelectorAll("svg.lines")) {
    const [low, high, start, end] = numbers(plot.dataset.frame);
    const guide = plot.querySelector(".guide");
    const lines = [...plot.querySelectorAll(".line")].map((line) => ({
      name: line.dataset.name, xs: numbers(line.dataset.xs), ys: numbers(line.dataset.ys),
    }));
    const all = [...new Set(lines.flatMap((line) => line.xs))].sort((a, b) => a - b);
    if (!all.length) continue;
    const nearest = (xs, x) => xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);
    let current = -1;

    const point = (index, clientY) => {
      current = Math.max(0, Math.min(all.length - 1, index));
      const x = all[current];
      const place = start + ((x - low) / (high - low)) * (end - start);
      guide.setAttribute("transform", `translate(${place} 0)`);
      guide.style.visibility = "visible";
      const slack = (high - low) / 50;
      const values = lines.filter((line) => line.xs.length)
        .map((line) => ({ name: line.name, i: nearest(line.xs, x), line }))
        .filter(({ line, i }) => Math.abs(line.xs[i] - x) <= slack)
        .map(({ name, line, i }) => ({ name, y: line.ys[i] })).sort((a, b) => b.y - a.y);
      const box = plot.getBoundingClientRect();
      const left = box.left + (place * box.width) / plot.viewBox.baseVal.width;
      const rows = values.map(({ name, y }) => `${name}: ${y.toFixed(4)}`);
      show(`${Math.round(x).toLocaleString("en")} ${plot.dataset.x}\n${rows.join("\n")}`, left, clientY ?? box.top + 30);
    };
    const leave = () => { guide.style.visibility = "hidden"; current = -1; hide(); };

    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const place = ((event.clientX - box.left) * plot.viewBox.baseVal.width) / box.width;
      point(nearest(all, low + ((place - start) / (end - start)) * (high - low)), event.clientY);
    });
    plot.addEventListener("pointerleave", leave);
    plot.addEventListener("blur", leave);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      point(current < 0 ? (step > 0 ? 0 : all.length - 1) : current + step);
    });
  }
})();
