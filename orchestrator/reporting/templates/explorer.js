// Quality against size: draws the points of #explorer-data for the metric, axis, source and methods that are chosen.
(() => {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const byId = (id) => document.getElementById(id);
  const chart = byId("explorer"), metric = byId("explorer-metric"), axis = byId("explorer-axis");
  const source = byId("explorer-source"), methods = byId("explorer-methods"), text = byId("explorer-text");
  const symbols = ["circle", "square", "triangle-up", "star", "triangle-down", "cross", "hexagon", "pentagon"];

  const value = (point, name) => name === "parameters" || name === "layers" ? point[name] : (point.numbers[name] || [])[0];
  const chosen = () => new Set([...methods.querySelectorAll("input:checked")].map((box) => box.value));
  const several = data.models.length > 1;

  // The points that no other beats in both; `sign` is 1 where more is better, on either axis.
  function front(points, xSign, ySign) {
    const sorted = [...points].sort((a, b) => xSign * (b.x - a.x) || ySign * (b.y - a.y));
    let best = -Infinity;
    return sorted.filter((p) => ySign * p.y > best && ((best = ySign * p.y), true));
  }

  const size = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(2)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n.toLocaleString("en"));
  const told = (p) => `${several ? `${p.model}, ` : ""}${p.method}${p.seeds > 1 ? `, ${p.seeds} seeds` : ""}<br>${p.layers ?? "?"} layers, ${size(p.parameters)} parameters`;

  function draw() {
    const name = metric.value, across = axis.value, shown = chosen(), all = several && source.value === "";
    const points = data.points
      .filter((p) => (all || p.model === source.value) && (p.method === data.dense || shown.has(p.method)))
      .map((p) => ({ ...p, x: value(p, across), y: value(p, name) }))
      .filter((p) => p.x != null && p.y != null);
    const traces = [data.dense, ...data.methods].map((method, i) => {
      const own = points.filter((p) => p.method === method);
      const symbol = (p) => (i === 0 ? "diamond" : symbols[all ? data.models.indexOf(p.model) % symbols.length : 0]);
      return {
        name: method, x: own.map((p) => p.x), y: own.map((p) => p.y), mode: "markers", type: "scatter",
        marker: { size: 10, opacity: 0.85, symbol: own.map(symbol), color: data.colours[i % data.colours.length] },
        error_y: { type: "data", array: own.map((p) => p.numbers[name][1]), thickness: 1, width: 3 },
        text: own.map(told), customdata: own.map((p) => p.numbers[name][2]),
        hovertemplate: `%{text}<br>${data.names[name]} %{y:.4g}<extra></extra>`,
      };
    }).filter((trace) => trace.x.length);
    const up = data.directions[name] === "higher" ? 1 : -1;
    const best = front(points, across === "parameters" || across === "layers" ? -1 : 1, up);
    traces.unshift({
      name: "Pareto front", x: best.map((p) => p.x), y: best.map((p) => p.y), mode: "lines", type: "scatter",
      line: { dash: "dot", width: 2, color: data.colours[0] }, hoverinfo: "skip",
    });
    const ys = points.map((p) => p.y).filter((y) => y > 0);
    const wide = up < 0 && ys.length && Math.max(...ys) > 8 * Math.min(...ys);
    Plotly.react(chart, traces, {
      height: 440, margin: { l: 60, r: 20, t: 20, b: 50 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      hovermode: "closest", showlegend: false, dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
      xaxis: { title: { text: data.axes[across] }, automargin: true, ...(across === "layers" ? wholeTicks(points.map((p) => p.x)) : {}) },
      yaxis: { title: { text: `${data.names[name]} (${up > 0 ? "higher" : "lower"} is better)` }, type: wide ? "log" : "linear", automargin: true },
    }, { displayModeBar: false, responsive: true });
    text.textContent = points.length === 0 ? "Nothing of this was measured yet." : `${points.length} models; on the front: ` +
      best.map((p) => `${all ? `${p.model} ` : ""}${p.method}${p.method === data.dense ? "" : ` at ${p.layers} layers`}`)
        .filter((one, i, every) => every.indexOf(one) === i).join(", ") + ".";
  }

  for (const control of [metric, axis, source, methods]) control.addEventListener("change", draw);
  draw();
  chart.on("plotly_click", (event) => {
    const stage = event.points[0].customdata;
    if (document.getElementById(stage)) location.hash = stage;
  });
})();
