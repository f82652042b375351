"use strict";
// Draws the page's charts, and reads and zooms them by pointer and keys.
(() => {
  const data = JSON.parse(document.getElementById("charts-data").textContent);
  const said = document.body.appendChild(make("p", "sr"));
  said.setAttribute("role", "status");

  function make(tag, name, text) {
    const one = document.createElement(tag);
    if (name) one.className = name;
    if (text !== undefined) one.textContent = text;
    return one;
  }

  function written(value, form) {
    if (value === null || value === undefined) return "not finite";
    if (form === "%") return (value * 100).toFixed(1).replace(".0", "") + "%";
    const size = Math.abs(value);
    if (form === "count" || (Number.isInteger(value) && size < 1e6) || (size >= 1000 && size < 1e6))
      return Math.round(value).toLocaleString("en");
    if (value === 0) return "0";
    return size >= 1e-4 && size < 1e6 ? String(Number(value.toPrecision(4))) : value.toExponential(3).replace(/\.?0+e/, "e");
  }

  function ticks(low, high, most) {
    const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= raw * (1 - 1e-9));
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  }

  class Plot {
    constructor(chart) {
      this.chart = chart;
      this.figure = document.getElementById("chart-" + chart.key);
      this.box = this.figure.querySelector(".plot");
      this.svg = this.box.querySelector("svg");
      this.lines = chart.lines.map((line, i) => ({
        ...line, x: data.xs[line.x],
        group: this.svg.querySelector(`[data-line="${i}"]`),
        value: this.figure.querySelector(`.legend [data-line="${i}"] b`),
        key: this.figure.querySelector(`.legend [data-line="${i}"] .key`),
      }));
      this.xs = [...new Set(this.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
      if (chart.stairs) this.xs.pop();
      this.home = chart.domain;
      this.view = this.home;
      // beside each line, while none is read, its last value
      this.rest = this.lines.map((line) => (chart.stairs ? "" : written(line.y.findLast((y) => y !== null), chart.form)));
      this.lines.forEach((line, i) => { line.value.textContent = this.rest[i]; });
      this.svg.setAttribute("role", "application");
      this.svg.setAttribute("aria-roledescription", "chart");
      this.svg.setAttribute("aria-label", this.svg.getAttribute("aria-label") +
        " Left and right arrow keys read values, plus and minus zoom, Escape shows all.");
      this.tip = this.box.appendChild(make("div", "tip"));
      this.tip.hidden = true;
      this.tip.setAttribute("aria-hidden", "true");
      const tools = this.figure.querySelector(".tools");
      this.buttons = [["+", "Zoom in", () => this.zoom(0.5)], ["−", "Zoom out", () => this.zoom(2)], ["Reset", "Show all of", () => show(this, null)]].map(
        ([text, label, act]) => {
          const button = tools.appendChild(make("button", "", text));
          button.type = "button";
          button.setAttribute("aria-label", `${label}${text === "Reset" ? " " : ": "}${chart.title}`);
          button.addEventListener("click", act);
          return button;
        });
      this.listen();
      this.look(null);
    }

    get zoomed() { return this.view[0] > this.home[0] || this.view[1] < this.home[1]; }
    across(x) { return ((x - this.view[0]) / (this.view[1] - this.view[0])) * 1000; }
    down(y) { return 1000 - ((y - this.view[2]) / (this.view[3] - this.view[2])) * 1000; }
    spot(x, y) { return `${this.across(x).toFixed(1)} ${this.down(y).toFixed(1)}`; }
    inside(x) { return x >= this.view[0] && x <= this.view[1]; }

    look(from, to) {
      if (from === null) this.view = this.home;
      else {
        let low = Infinity, high = -Infinity;
        for (const line of this.lines)
          line.x.forEach((x, i) => {
            // a point beyond either edge counts, as the line to it is seen
            const near = (line.x[i + 1] ?? x) >= from && (line.x[i - 1] ?? x) <= to;
            if (!near || line.y[i] === null) return;
            for (const y of [line.y[i], ...(line.band ? line.band[i] : [])]) if (y !== null) { low = Math.min(low, y); high = Math.max(high, y); }
          });
        if (low === Infinity) [low, high] = [this.home[2], this.home[3]];
        const [floor, top] = this.chart.limits;
        if (floor !== null) low = Math.min(low, floor);
        if (top !== null) high = Math.max(high, top);
        const air = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
        this.view = [from, to, floor === null ? low - air : low, top === null ? high + air : high];
      }
      this.draw();
      this.state();
    }

    path(line, area) {
      let text = "", pen = "M";
      line.x.forEach((x, i) => {
        const y = line.y[i];
        if (y === null) { pen = "M"; return; }
        text += pen === "L" && this.chart.stairs ? `H${this.across(x).toFixed(1)}V${this.down(y).toFixed(1)}` : pen + this.spot(x, y);
        pen = "L";
      });
      return area && text ? `${text}L${this.spot(line.x[line.x.length - 1], 0)}L${this.spot(line.x[0], 0)}Z` : text;
    }

    draw() {
      const [x0, x1, y0, y1] = this.view;
      for (const line of this.lines) {
        const set = (name, text) => { const one = line.group.querySelector(name); if (one) one.setAttribute("d", text); };
        set(".line", this.path(line));
        set(".area", this.path(line, true));
        set(".dots", line.x.map((x, i) => (line.y[i] === null ? "" : `M${this.spot(x, line.y[i])}h0`)).join(""));
        if (line.band) set(".band", line.x.map((x, i) => (line.band[i][0] === null ? "" : `M${this.spot(x, line.band[i][0])}L${this.spot(x, line.band[i][1])}`)).join(""));
      }
      for (const level of this.svg.querySelectorAll(".level"))
        level.setAttribute("d", this.chart.across === null ? `M${this.across(this.chart.upright)} 0V1000` : `M0 ${this.down(this.chart.across)}H1000`);
      this.box.querySelectorAll(":scope>span").forEach((one) => one.remove());
      let grid = "";
      for (const y of ticks(y0, y1, 4)) {
        if (this.chart.form === "count" && !Number.isInteger(y)) continue;
        grid += `M0 ${this.down(y).toFixed(1)}H1000`;
        this.box.appendChild(make("span", "y", written(y, this.chart.form))).style.bottom = 100 - this.down(y) / 10 + "%";
      }
      for (const x of ticks(x0, x1, 6)) this.box.appendChild(make("span", "x", written(x))).style.left = this.across(x) / 10 + "%";
      this.svg.querySelector(".grid").setAttribute("d", grid);
    }

    state() {
      this.buttons[0].disabled = this.xs.length < 3;
      this.buttons[1].disabled = this.buttons[2].disabled = !this.zoomed;
    }

    zoom(by) {
      const [from, to] = this.view, [low, high] = this.home;
      const least = Math.max((high - low) / 500, 1e-9);
      const width = Math.min(high - low, Math.max(least, (to - from) * by));
      const middle = this.at !== undefined && this.inside(this.at) ? this.at : (from + to) / 2;
      const start = Math.min(high - width, Math.max(low, middle - width * ((middle - from) / (to - from))));
      const at = this.at;
      show(this, width >= high - low ? null : start, start + width);
      if (at !== undefined) read(this, at);
    }

    nearest(x) {
      const seen = this.xs.filter((one) => this.inside(one));
      if (!seen.length) return undefined;
      if (this.chart.stairs) return seen.filter((one) => one <= x).pop() ?? seen[0];
      return seen.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best));
    }

    // what each line has at x, or very near it where lines were thinned out
    values(x) {
      const near = this.chart.stairs ? 1e-9 : (this.view[1] - this.view[0]) / 120;
      return this.lines.map((line) => {
        let best = -1;
        line.x.forEach((one, i) => {
          if (Math.abs(one - x) <= near && (best < 0 || Math.abs(one - x) < Math.abs(line.x[best] - x))) best = i;
        });
        return best < 0 ? undefined : { x: line.x[best], y: line.y[best], band: line.band && line.band[best] };
      });
    }

    read(x, active) {
      const guide = this.svg.querySelector(".guide"), dots = this.svg.querySelector(".reading");
      const gone = x === undefined || !this.inside(x);
      this.at = gone ? undefined : x;
      this.tip.hidden = gone || !active;
      if (gone) {
        guide.setAttribute("d", "");
        dots.setAttribute("d", "");
        this.lines.forEach((line, i) => { line.value.textContent = this.rest[i]; });
        return "";
      }
      const found = this.values(x), form = this.chart.form;
      const bin = this.chart.stairs ? this.lines[0].x[this.lines[0].x.indexOf(x) + 1] ?? x : x;
      guide.setAttribute("d", `M${this.across((x + bin) / 2)} 0V1000`);
      dots.setAttribute("d", found.map((one) => (one && one.y !== null && !this.chart.stairs ? `M${this.spot(one.x, one.y)}h0` : "")).join(""));
      const name = this.chart.stairs ? `${this.chart.x} ${written(x)} to ${written(bin)}` : `${this.chart.x} ${written(x)}`;
      this.tip.replaceChildren(make("b", "", name));
      const words = [name];
      this.lines.forEach((line, i) => {
        const one = found[i];
        line.value.textContent = one ? written(one.y, form) : "";
        if (!one) return;
        const band = one.band && one.band[0] !== null ? ` (${written(one.band[0], form)} to ${written(one.band[1], form)})` : "";
        const text = written(one.y, form) + band, row = this.tip.appendChild(make("div"));
        row.append(line.key.cloneNode(true), make("span", "", line.n), make("strong", "", text));
        words.push(`${line.n} ${text}`);
      });
      const place = this.across((x + bin) / 2) / 10;
      this.tip.style.top = ".3rem";
      this.tip.style.left = place < 50 ? `calc(${place}% + .7rem)` : "auto";
      this.tip.style.right = place < 50 ? "auto" : `calc(${100 - place}% + .7rem)`;
      return words.join(", ");
    }

    listen() {
      const svg = this.svg, pick = svg.querySelector(".pick");
      const value = (event) => {
        const box = svg.getBoundingClientRect();
        const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
        return this.view[0] + share * (this.view[1] - this.view[0]);
      };
      let start = null;
      const drop = () => { start = null; pick.setAttribute("width", 0); };
      svg.addEventListener("pointerdown", (event) => {
        read(this, this.nearest(value(event)));
        if (event.pointerType === "touch" || event.button) return;
        start = { x: value(event), px: event.clientX };
        svg.setPointerCapture(event.pointerId);
      });
      svg.addEventListener("pointermove", (event) => {
        read(this, this.nearest(value(event)));
        if (!start) return;
        const [a, b] = [this.across(start.x), this.across(value(event))];
        pick.setAttribute("x", Math.min(a, b));
        pick.setAttribute("width", Math.abs(a - b));
      });
      svg.addEventListener("pointerup", (event) => {
        const from = start, to = value(event);
        drop();
        if (from && Math.abs(event.clientX - from.px) > 8) show(this, Math.min(from.x, to), Math.max(from.x, to));
      });
      svg.addEventListener("pointercancel", drop);
      svg.addEventListener("pointerleave", () => { if (!start) read(this, undefined); });
      svg.addEventListener("dblclick", () => show(this, null));
      svg.addEventListener("blur", () => read(this, undefined));
      svg.addEventListener("keydown", (event) => {
        const seen = this.xs.filter((x) => this.inside(x));
        const place = this.at === undefined ? -1 : seen.indexOf(this.at);
        const to = { ArrowRight: place + 1, ArrowLeft: place < 0 ? seen.length - 1 : place - 1, Home: 0, End: seen.length - 1,
                     PageDown: place + 10, PageUp: place - 10 }[event.key];
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        if (to !== undefined) said.textContent = read(this, seen[Math.min(seen.length - 1, Math.max(0, to))]);
        else if (event.key === "+" || event.key === "=") this.zoom(0.5);
        else if (event.key === "-") this.zoom(2);
        else if (event.key === "Escape") { show(this, null); read(this, undefined); said.textContent = "all shown"; }
        else return;
        event.preventDefault();
      });
    }
  }

  // in a frame whose page is its attribute, as in a notebook, an address with # would lead to the notebook
  document.querySelector("nav").addEventListener("click", (event) => {
    const place = event.target.hash && document.getElementById(event.target.hash.slice(1));
    if (!place) return;
    event.preventDefault();
    place.scrollIntoView();
  });

  const plots = data.charts.map((chart) => new Plot(chart));
  // charts over the same steps read and zoom together; a histogram is alone
  const together = (one) => (one.chart.stairs ? [one] : plots.filter((other) => !other.chart.stairs));

  function read(one, x) {
    let words = "";
    for (const other of together(one)) {
      const text = other.read(x, other === one);
      if (other === one) words = text;
    }
    return words;
  }

  function show(one, from, to) {
    if (from !== null && !(to > from)) return;
    for (const other of together(one)) {
      const [low, high] = other.home;
      const [a, b] = from === null ? [null] : [Math.max(low, from), Math.min(high, to)];
      other.look(a === null || !(b > a) || (a <= low && b >= high) ? null : a, b);
    }
    read(one, undefined);
  }
})();
