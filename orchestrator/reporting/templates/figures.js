// Draws each figure from the JSON beside it, those in a closed part when it is opened; opens what a link leads into.
(() => {
  const clear = "rgba(0,0,0,0)", fine = matchMedia("(pointer: fine)").matches;
  const base = (panel) => ({
    margin: { l: 58, r: 12, t: 8, b: 46 }, paper_bgcolor: clear, plot_bgcolor: clear, showlegend: false,
    font: { size: 11 }, dragmode: fine ? "zoom" : false,  // on a phone, a finger scrolls the page
    xaxis: { title: { text: panel.x }, automargin: true }, yaxis: { title: { text: panel.y }, automargin: true },
  });

  const sequence = {{ sequence | json }};

  // 1, 2 and 5 of every decade; of many decades the powers of ten.
  function logTicks(values) {
    const [low, high] = [Math.min(...values), Math.max(...values)], ticks = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k++) {
      for (const digit of high > 1000 * low ? [1] : [1, 2, 5]) ticks.push(digit * 10 ** k);
    }
    return ticks;
  }

  const shownValues = (panel) => panel.curves.flatMap((c) => c.y).filter((y) => y > 0);

  function logAxis(values) {
    const ticks = logTicks(values);
    return { type: "log", tickvals: ticks, ticktext: ticks.map((v) => v.toPrecision(1) * 1 + "") };
  }

  function lines(panel, colours) {
    const traces = panel.curves.map((c) => ({
      name: c.n, x: c.x, y: c.y, legendgroup: c.g, type: "scatter",
      mode: c.d || c.x.length > 40 ? "lines" : "lines+markers", marker: { size: 5 },
      line: { color: colours[c.g], width: 2, dash: c.d ? "dash" : "solid" },
      error_y: c.e ? { type: "data", array: c.e, thickness: 1, width: 2 } : undefined,
      hovertemplate: "%{y:.4g}",
    }));
    const layout = base(panel);
    layout.hovermode = "x unified";
    if (panel.whole) Object.assign(layout.xaxis, wholeTicks(panel.curves.flatMap((c) => c.x)));
    if (panel.log) Object.assign(layout.yaxis, logAxis(shownValues(panel)));
    return [traces, layout];
  }

  function bars(panel, colours) {
    const traces = panel.curves.map((c) => ({
      name: c.n, x: c.x.map(String), y: c.y, legendgroup: c.g, type: "bar", marker: { color: colours[c.g] },
      error_y: c.e ? { type: "data", array: c.e, thickness: 1, width: 2, color: "#8c8c8c" } : undefined,
      hovertemplate: "%{y:.4g}",
    }));
    const layout = base(panel);
    layout.barmode = panel.kind === "stacked" ? "stack" : "group";
    layout.hovermode = "x unified";
    if (panel.log) {
      const values = shownValues(panel), range = [Math.min(...values) / 2, Math.max(...values) * 2].map(Math.log10);
      Object.assign(layout.yaxis, logAxis(values), { range });
    }
    Object.assign(layout.xaxis, { type: "category", categoryorder: "array", categoryarray: panel.places.map(String) });
    return [traces, layout];
  }

  function heatMap(panel) {
    const shown = panel.z.flat().filter((v) => v != null), reach = Math.max(...shown.map(Math.abs)) || 1;
    const scale = panel.zero
      ? { colorscale: [[0, "#b2182b"], [0.5, "#e8e8e8"], [1, "#2166ac"]], zmin: -reach, zmax: reach }
      : { colorscale: sequence.map((colour, i) => [i / (sequence.length - 1), colour]) };
    const map = {
      type: "heatmap", x: panel.xs.map(String), y: panel.ys.map(String), z: panel.z, ...scale, xgap: 1, ygap: 1, hoverongaps: false,
      colorbar: { title: { text: panel.value, side: "right" }, thickness: 12 },
      hovertemplate: `${panel.x} %{x}, ${panel.y} %{y}: %{z:.4g}<extra></extra>`,
    };
    const crosses = {
      type: "scatter", mode: "markers", x: panel.marked.map((m) => String(m[0])), y: panel.marked.map((m) => String(m[1])),
      marker: { symbol: "x", size: 9, color: "#e5383b", line: { color: "white", width: 1 } }, hoverinfo: "skip",
    };
    const layout = base(panel);
    Object.assign(layout.xaxis, { type: "category", showgrid: false });
    Object.assign(layout.yaxis, { type: "category", showgrid: false, autorange: "reversed" });
    return [[map, crosses], layout];
  }

  // One entry a colour; a click hides or shows its curves in all panels.
  function fillLegend(box, data, plots) {
    const curves = data.panels.flatMap((panel) => panel.curves || []);
    const used = data.legend.map((entry, g) => [...entry, g, curves.filter((c) => c.g === g)]).filter((e) => e[3].length);
    if (used.length < 2) return;
    for (const [name, colour, g, own] of used) {
      const button = document.createElement("button"), line = document.createElement("i");
      line.style.borderTop = `3px ${own.every((c) => c.d) ? "dashed" : "solid"} ${colour}`;
      button.append(line, name);
      button.setAttribute("aria-pressed", "true");
      button.onclick = () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", shown);
        for (const plot of plots) {
          const places = plot.data.flatMap((trace, i) => (trace.legendgroup === g ? [i] : []));
          if (places.length) Plotly.restyle(plot, { visible: shown }, places);
        }
      };
      const item = document.createElement("li");
      item.append(button);
      box.append(item);
    }
  }

  function draw(box) {
    if (box.dataset.drawn) return;
    box.dataset.drawn = "yes";
    const data = JSON.parse(box.querySelector("script").textContent), colours = data.legend.map((entry) => entry[1]);
    const plots = [...box.querySelectorAll(".plot")];
    data.panels.forEach((panel, i) => {
      const [traces, layout] = panel.kind === "map" ? heatMap(panel) : panel.kind === "lines" ? lines(panel, colours) : bars(panel, colours);
      Plotly.newPlot(plots[i], traces, layout, { displayModeBar: false, responsive: true });
    });
    fillLegend(box.querySelector(".legend"), data, plots);
  }

  const drawOpen = () => document.querySelectorAll(".plots").forEach((box) => box.checkVisibility() && draw(box));
  drawOpen();
  document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", drawOpen));

  // Of a table that is wider than its place, the edge fades as long as there is more.
  const boxes = document.querySelectorAll(".scroll");
  const fade = (box) => {
    box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    box.classList.toggle("more", box.scrollWidth > box.clientWidth + box.scrollLeft + 1);
  };
  const resized = new ResizeObserver((entries) => entries.forEach((entry) => fade(entry.target)));
  for (const box of boxes) {
    box.addEventListener("scroll", () => fade(box));
    resized.observe(box);
  }

  // Paper cannot be clicked, and has a width of its own.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(.lookup)")];
    for (const box of opened) box.open = true;
    drawOpen();
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      if (plot.offsetParent) Plotly.relayout(plot, { width: plot.closest(".panels:not(.single)") ? 330 : 680 });
    }
  });
  addEventListener("afterprint", () => {
    for (const box of opened) box.open = false;
    for (const plot of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(plot, { width: null, autosize: true });
  });

  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target) return;
    for (let box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
})();
