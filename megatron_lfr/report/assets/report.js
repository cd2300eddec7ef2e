"use strict";
// Values under the pointer, zoom, lines on and off, pictures. Without this script the page shows the same plots, and
// every plot has its numbers as a table.
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

  document.addEventListener("pointermove", (event) => {
    if (event.target.closest(".lines")) return;
    const marked = event.target.closest("[data-tip]");
    if (marked) show(marked.dataset.tip, event.clientX, event.clientY);
    else hide();
  });

  const numbers = (text) => (text ? text.split(" ").map(Number) : []);
  const scale = ([low, high, start, end]) => (value) => start + ((value - low) / (high - low)) * (end - start);
  const nearest = (xs, x) => xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(xs[best] - x) ? i : best), 0);

  const make = (name, attributes, text = "") => {
    const node = document.createElementNS(document.querySelector("svg").namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    return node;
  };

  // [value, numeral] of about `count` round values from low to high.
  const ticks = (low, high, count) => {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * (1 - 1e-9));
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, i) => [(first + i) * step, ((first + i) * step).toFixed(digits)]);
  };

  // The points [x, mean, min, max] from low to high, with one on each bound where a line crosses it.
  const within = (points, low, high) => {
    const inside = points.filter(([x]) => x >= low && x <= high);
    const crossing = (bound) => {
      const next = points.findIndex(([x]) => x > bound);
      if (next < 1 || points[next - 1][0] === bound) return [];
      const [a, b] = [points[next - 1], points[next]], share = (bound - a[0]) / (b[0] - a[0]);
      return [a.map((value, i) => value + share * (b[i] - value))];
    };
    return [...crossing(low), ...inside, ...crossing(high)];
  };

  // Neighbouring points as one, where there are more than `most`.
  const merged = (points, most) => {
    if (points.length <= most) return points;
    return Array.from({ length: most }, (_, i) => {
      const part = points.slice(Math.floor((i * points.length) / most), Math.floor(((i + 1) * points.length) / most));
      const mean = (column) => part.reduce((sum, point) => sum + point[column], 0) / part.length;
      return [mean(0), mean(1), Math.min(...part.map((point) => point[2])), Math.max(...part.map((point) => point[3]))];
    });
  };

  class LinePlot {
    constructor(svg) {
      this.svg = svg;
      const frame = numbers(svg.dataset.frame);
      [this.x, this.y] = [frame.slice(0, 4), frame.slice(4)];
      [this.all, this.fitted] = [this.x, this.y];
      this.lines = [...svg.querySelectorAll(".series")].map((group) => {
        const [xs, ys, lows, highs] = ["xs", "ys", "lows", "highs"].map((key) => numbers(group.dataset[key]));
        return { group, name: group.dataset.name, points: xs.map((x, i) => [x, ys[i], lows[i] ?? ys[i], highs[i] ?? ys[i]]) };
      });
      this.current = -1;
      this.guide = svg.querySelector(".guide");
      this.chosen = svg.querySelector(".chosen");
      this.listen();
    }

    get shown() { return this.lines.filter((line) => !line.group.classList.contains("off")); }

    // Show x from low to high, or as much of it as there is.
    zoom(low, high) {
      const [first, last] = this.all, size = Math.min(high - low, last - first);
      if (size < (last - first) / 1000) return;
      const start = Math.max(first, Math.min(last - size, low));
      this.x = [start, start + size, ...this.all.slice(2)];
      this.draw();
    }

    zoomBy(factor, centre = (this.x[0] + this.x[1]) / 2) {
      const [low, high] = this.x;
      this.zoom(centre - (centre - low) * factor, centre + (high - centre) * factor);
    }

    move(share) { this.zoom(...this.x.slice(0, 2).map((value) => value + share * (this.x[1] - this.x[0]))); }

    reset() { this.zoom(...this.all); }

    draw() {
      const [low, high, start, end] = this.x;
      const zoomed = low > this.all[0] || high < this.all[1];
      const lines = this.lines.map((line) => [line, merged(within(line.points, low, high), Math.floor((end - start) / 2))]);
      this.fit(lines.filter(([line]) => this.shown.includes(line)), zoomed);
      const x = scale(this.x), y = scale(this.y), top = Math.min(this.y[2], this.y[3]), bottom = this.y[2];
      const at = (value) => Math.max(top, Math.min(bottom, y(value))).toFixed(1);
      for (const [{ group, points }, parts] of lines) {
        const side = (column) => parts.map((point) => `${x(point[0]).toFixed(1)},${at(point[column])}`);
        group.querySelector(".line").setAttribute("points", side(1).join(" "));
        group.querySelector(".range")?.setAttribute("points", [...side(2), ...side(3).reverse()].join(" "));
        group.querySelectorAll(".mark").forEach((mark, i) => {
          mark.setAttribute("cx", x(points[i][0]).toFixed(1));
          mark.setAttribute("cy", at(points[i][1]));
          mark.classList.toggle("outside", points[i][0] < low || points[i][0] > high);
        });
      }
      this.svg.classList.toggle("changed", zoomed || this.shown.length < this.lines.length);
      this.drawAxes(x, y);
      this.drawPhases(x);
      this.leave();
    }

    // The y axis spans the visible values; over the whole x axis it leaves out what it left out at first.
    fit(lines, zoomed) {
      const ys = lines.flatMap(([, points]) => points.map((point) => point[1]));
      if (!ys.length) { this.y = this.fitted; return; }
      const low = Math.min(...ys), high = Math.max(...ys), room = 0.04 * (high - low) || 0.05 * Math.abs(high) || 0.5;
      const [least, most] = zoomed ? [-Infinity, Infinity] : this.fitted;
      this.y = [Math.max(least, low - room), Math.min(most, high + room), ...this.fitted.slice(2)];
    }

    drawAxes(x, y) {
      const [left, right] = this.x.slice(2), base = Number(this.svg.dataset.base), unit = Number(this.svg.dataset.unit);
      const below = ticks(this.x[0] / unit, this.x[1] / unit, 6).flatMap(([value, text]) => [
        make("line", { x1: x(value * unit), x2: x(value * unit), y1: base, y2: base + 4, class: "base" }),
        make("text", { x: x(value * unit), y: base + 18, class: "tick", "text-anchor": "middle" }, text),
      ]);
      const beside = ticks(this.y[0], this.y[1], Number(this.svg.dataset.ticks)).flatMap(([value, text]) => [
        make("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "grid" }),
        make("text", { x: left - 8, y: y(value) + 4, class: "tick", "text-anchor": "end" }, text),
      ]);
      this.svg.querySelector(".x-ticks").replaceChildren(...below);
      this.svg.querySelector(".y-ticks").replaceChildren(...beside);
    }

    drawPhases(x) {
      for (const band of this.svg.querySelectorAll(".phase")) {
        const [start, end] = numbers(band.dataset.span).map((value) => Math.max(this.x[2], Math.min(this.x[3], x(value))));
        const rectangle = band.querySelector("rect"), name = band.querySelector("text");
        rectangle.setAttribute("x", start);
        rectangle.setAttribute("width", end - start);
        name.setAttribute("x", (start + end) / 2);
        name.textContent = [band.dataset.name, band.dataset.name.split(" ")[0]]
          .find((text) => end - start > 6.6 * text.length + 4) ?? "";
      }
    }

    // Show the values at the visible point of this number, counted over all lines.
    point(index, clientY) {
      const all = this.places();
      if (!all.length) return;
      const [low, high] = this.x, box = this.svg.getBoundingClientRect();
      this.current = Math.max(0, Math.min(all.length - 1, index));
      const x = all[this.current], place = scale(this.x)(x);
      this.guide.setAttribute("transform", `translate(${place} 0)`);
      this.guide.style.visibility = "visible";
      const rows = this.shown.filter((line) => line.points.length)
        .map(({ name, points }) => ({ name, nearest: points[nearest(points.map((point) => point[0]), x)] }))
        .filter((row) => Math.abs(row.nearest[0] - x) <= (high - low) / 50)
        .sort((a, b) => b.nearest[1] - a.nearest[1]).map((row) => `${row.name}: ${row.nearest[1].toFixed(4)}`);
      const left = box.left + (place * box.width) / this.svg.viewBox.baseVal.width;
      show(`${Math.round(x).toLocaleString("en")} ${this.svg.dataset.x}\n${rows.join("\n")}`, left, clientY ?? box.top + 30);
    }

    places() {
      const all = this.shown.flatMap((line) => line.points.map((point) => point[0]));
      return [...new Set(all)].filter((x) => x >= this.x[0] && x <= this.x[1]).sort((a, b) => a - b);
    }

    leave() {
      this.guide.style.visibility = "hidden";
      this.current = -1;
      hide();
    }

    // The x value under a pointer.
    under(event) {
      const box = this.svg.getBoundingClientRect(), [low, high, start, end] = this.x;
      const place = ((event.clientX - box.left) * this.svg.viewBox.baseVal.width) / box.width;
      return Math.max(low, Math.min(high, low + ((place - start) / (end - start)) * (high - low)));
    }

    listen() {
      const on = (name, action) => this.svg.addEventListener(name, action);
      let from = null;
      const choose = (to) => {
        const [start, end] = [from, to].map(scale(this.x)).sort((a, b) => a - b);
        this.chosen.setAttribute("x", start);
        this.chosen.setAttribute("width", end - start);
        return end - start > 6;
      };
      on("pointerdown", (event) => {
        if (event.button || event.pointerType === "touch") return; // a finger scrolls
        from = this.under(event);
        this.svg.setPointerCapture(event.pointerId);
      });
      on("pointermove", (event) => {
        if (from !== null) choose(this.under(event));
        this.point(nearest(this.places(), this.under(event)), event.clientY);
      });
      on("pointerup", (event) => {
        if (from === null) return;
        const to = this.under(event), wide = choose(to), [low, high] = [from, to].sort((a, b) => a - b);
        from = null;
        this.chosen.setAttribute("width", 0);
        if (wide) this.zoom(low, high);
      });
      on("pointercancel", () => { from = null; this.chosen.setAttribute("width", 0); });
      on("dblclick", () => this.reset());
      on("pointerleave", () => this.leave());
      on("blur", () => this.leave());
      on("keydown", (event) => {
        if (event.ctrlKey || event.altKey || event.metaKey) return;
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const marked = this.current < 0 ? undefined : this.places()[this.current];
        if (step && event.shiftKey) this.move(step / 4);
        else if (step) this.point(this.current < 0 ? (step > 0 ? 0 : Infinity) : this.current + step);
        else if (event.key === "+" || event.key === "=") this.zoomBy(1 / 2, marked);
        else if (event.key === "-") this.zoomBy(2, marked);
        else if (event.key === "Escape") this.reset();
        else return;
        event.preventDefault();
      });
    }
  }

  // The plot as it is seen, as an SVG file: with its colours, as a file knows no style sheet of the page.
  const save = (svg) => {
    const copy = svg.cloneNode(true), originals = svg.querySelectorAll("*");
    copy.querySelectorAll("*").forEach((node, i) => {
      const style = getComputedStyle(originals[i]);
      for (const name of ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight"]) {
        node.setAttribute(name, style.getPropertyValue(name));
      }
      if (style.visibility === "hidden" || style.display === "none") node.setAttribute("visibility", "hidden");
    });
    copy.setAttribute("font-family", getComputedStyle(svg).fontFamily);
    const ground = getComputedStyle(svg.closest("section")).backgroundColor;
    copy.prepend(make("rect", { width: "100%", height: "100%", fill: ground }));
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" }));
    link.download = `${svg.getAttribute("aria-label").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 80)}.svg`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // some browsers read it later
  };

  const button = (text, action, title) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    if (title) { made.title = title; made.setAttribute("aria-label", title); }
    made.addEventListener("click", action);
    return made;
  };

  const plots = new Map([...document.querySelectorAll("svg.lines")].map((svg) => [svg, new LinePlot(svg)]));

  for (const svg of document.querySelectorAll("figure svg.plot")) {
    const tools = document.createElement("div"), plot = plots.get(svg), what = svg.getAttribute("aria-label");
    tools.className = "tools";
    if (plot) {
      tools.append(
        button("−", () => plot.zoomBy(2), `Zoom out: ${what}`),
        button("+", () => plot.zoomBy(1 / 2), `Zoom in: ${what}`),
        button("←", () => plot.move(-1 / 4), `Move left: ${what}`),
        button("→", () => plot.move(1 / 4), `Move right: ${what}`),
        button("All", () => plot.reset(), `Show all: ${what}`),
      );
    }
    tools.append(button("Save", () => save(svg), `Save as SVG: ${what}`));
    svg.closest(".scroll").after(tools);
  }

  // Each name in a legend of lines turns them on and off, in the figure or section that it belongs to.
  for (const entry of document.querySelectorAll(".legend.of-lines li")) {
    const name = entry.textContent, scope = entry.closest("figure, section");
    const toggle = button("", () => {
      const on = toggle.getAttribute("aria-pressed") !== "true";
      toggle.setAttribute("aria-pressed", on);
      for (const svg of scope.querySelectorAll("svg.lines")) {
        const plot = plots.get(svg), lines = plot.lines.filter((line) => line.name === name);
        for (const { group } of lines) group.classList.toggle("off", !on);
        if (lines.length) plot.draw();
      }
    });
    toggle.setAttribute("aria-pressed", true);
    toggle.append(...entry.childNodes);
    entry.append(toggle);
  }
})();
