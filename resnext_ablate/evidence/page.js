"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const payload = JSON.parse(await unpack("payload"));
  const frames = payload.frames ?? null;
  const element = (tag, text = "", name = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  // ---- numbers as the page shows them ----
  const si = (v) => {
    for (const [size, unit] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]])
      if (Math.abs(v) >= size) return Number((v / size).toPrecision(3)) + unit;
    return String(Number(v.toPrecision(3)));
  };
  const show = (v, c) => {
    if (v === null || v === undefined || v === "") return "";
    if (typeof v !== "number") return String(v);
    if (c.kind === "count") return si(v);
    if (c.kind === "p_value") return v < 0.0001 ? "< 0.0001" : v.toFixed(4);
    if (c.kind !== "number") return String(v);
    const text = Math.abs(v).toLocaleString("en-US", {
      minimumFractionDigits: c.digits, maximumFractionDigits: c.digits });
    if (/^[0.]*$/.test(text)) return text;
    return (v < 0 ? "-" : c.signed ? "+" : "") + text;
  };
  const number = (v, digits, signed = false) => show(v, { kind: "number", digits, signed });
  const badge = (verdict) => element("span", verdict, "badge " + verdict.split(" ")[0]);

  // ---- one net: what it is, how it learned, how to train it ----
  const rowsOf = (frame, variant) => {
    const { variant: names } = frame.values;
    return names.flatMap((name, i) => (name === variant ? [i] : []));
  };
  const hashOf = (variant, seed) =>
    "#net=" + encodeURIComponent(variant) + (seed === null ? "" : "&seed=" + seed);
  const choose = (variant, seed = null) => { location.hash = hashOf(variant, seed); };
  const dialog = $("net");

  const facts = (variant) => {
    const i = rowsOf(frames.nets, variant)[0];
    const at = (key) => frames.nets.values[key][i];
    const off = (key) => ` (${number(at(key), 2, true)}\u00a0% from the reference)`;
    return [
      ["net", at("name")],
      ["cardinality, widths by stage", `${at("cardinality")}, ${at("bottleneck_widths")}`],
      ["depth", at("depth")],
      ["FLOPs", number(at("macs"), 0) + off("macs_error_pct")],
      ["parameters", number(at("params"), 0) + off("params_error_pct")],
      ["activations", number(at("activations"), 0) + off("activations_error_pct")],
    ];
  };
  const verdictOf = (variant) => {
    const { values } = payload.tables.results;
    const i = values.variant.indexOf(variant);
    if (i < 0) return "";
    const mean = values.test_error_pct_mean[i];
    const interval = values.interval[i] && ` (95\u00a0% interval ${values.interval[i]})`;
    const error = mean === null ? "no complete run"
      : `test error ${number(mean, 2)}\u00a0%${interval}, ${values.n[i]} runs`;
    const verdict = values.verdict[i] ?? "";
    return `${verdict}${verdict && ": "}${error}`;
  };
  const runsTable = (variant, seed) => {
    const { values } = frames.runs;
    const head = element("tr");
    for (const label of ["seed", "state", "test error (%)", "val error (%)", "training (s)"]) {
      const cell = element("th", label);
      cell.scope = "col";
      head.append(cell);
    }
    const rows = rowsOf(frames.runs, variant).map((i) => {
      const row = element("tr", "", values.seed[i] === seed ? "chosen" : "");
      const first = element("th", String(values.seed[i]));
      first.scope = "row";
      row.append(first,
        element("td", values.state[i] + (values.reason[i] ? ": " + values.reason[i] : ""), "text"),
        element("td", number(values.test_error_pct[i], 2)),
        element("td", number(values.val_error_pct[i], 2)),
        element("td", number(values.train_time_s[i], 1)));
      return row;
    });
    const top = element("thead"), body = element("tbody");
    top.append(head);
    body.append(...rows);
    return [top, body];
  };
  const quoted = (text) =>
    /^[\w@%+:,./=-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\\''") + "'";
  const commands = (variant, seed) => {
    const i = rowsOf(frames.nets, variant)[0];
    const net = frames.nets.values.name[i];
    const seeds = seed === null ? [] : [`run.seeds=[${seed}]`];
    const run = ["resnext-ablate", "run", "study.toml", `name=${payload.study}-again`,
      "net.cardinality=[]", `net.variants=[${JSON.stringify(net)}]`, ...seeds];
    const describe = ["resnext-ablate", "describe", net, "--image-size",
      String(frames.nets.values.image_size[i])];
    return [describe, run].map((words) => words.map(quoted).join(" ")).join("\n");
  };
  const curves = (variant, seed) => {
    const { values } = frames.epochs;
    const seeds = [...new Set(rowsOf(frames.epochs, variant).map((i) => values.seed[i]))];
    return seeds.flatMap((one, k) => {
      const rows = rowsOf(frames.epochs, variant).filter((i) => values.seed[i] === one);
      const faded = seed !== null && seed !== one;
      return [["val_error_pct", "solid", "validation"], ["train_error_pct", "dash", "training"]]
        .map(([key, dash, word]) => ({
          x: rows.map((i) => values.epoch[i]), y: rows.map((i) => values[key][i]),
          mode: dash === "solid" && rows.length < 40 ? "lines+markers" : "lines",
          opacity: faded ? 0.3 : 1, name: `seed ${one}`, showlegend: dash === "solid",
          line: { dash, width: dash === "solid" ? 2 : 1.2, color: payload.colors[k % 6] },
          marker: { symbol: payload.symbols[(k + Math.floor(k / 6)) % 6], size: 6 },
          hovertemplate: `seed ${one}, epoch %{x}<br>${word} %{y:.2f} %<extra></extra>`,
        }));
    });
  };
  const drawCurves = (variant, seed) => {
    const data = curves(variant, seed);
    $("net-plot").hidden = data.length === 0;
    if (!data.length || !window.Plotly) return;
    const axis = (text) => ({ title: { text }, automargin: true, zeroline: false });
    Plotly.react($("net-plot"), data, {
      template: payload.themes[scheme()], height: 280, autosize: true, hovermode: "closest",
      margin: { l: 56, r: 12, t: 8, b: 44 }, xaxis: axis("epoch"), yaxis: axis("error (%)"),
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, showlegend: true,
    }, { ...config, displayModeBar: false });
  };
  const openChosen = () => {
    const found = /^#net=([^&]*)(?:&seed=(\d+))?$/.exec(location.hash);
    if (!found || !dialog || !frames) return;
    const variant = decodeURIComponent(found[1]);
    const seed = found[2] === undefined ? null : Number(found[2]);
    if (!rowsOf(frames.nets, variant).length) return;
    $("net-title").textContent = variant + (seed === null ? "" : `, seed ${seed}`);
    $("net-verdict").textContent = verdictOf(variant);
    $("net-facts").replaceChildren(...facts(variant).flatMap(
      ([term, text]) => [element("dt", term), element("dd", String(text))]));
    $("net-runs").replaceChildren(...runsTable(variant, seed));
    $("net-commands").textContent = commands(variant, seed);
    if (!dialog.open) dialog.showModal();
    $("net-title").focus();
    drawCurves(variant, seed);
  };
  if (dialog) {
    dialog.addEventListener("close", () =>
      history.replaceState(null, "", location.pathname + location.search));
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close();
    });
    addEventListener("hashchange", openChosen);
  }

  // ---- tables: sort, filter, download; at most `limit` rows on the page at once ----
  const limit = Number(document.body.dataset.maxRows);
  const collator = new Intl.Collator("en", { numeric: true });
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const quote = (v) => {
    // Text that a spreadsheet would take for a formula is kept from becoming one.
    const text = v === null ? "" : typeof v === "string" ? v.replace(/^(?=[=+\-@\t\r])/, "'") : String(v);
    return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  };
  for (const section of document.querySelectorAll("[data-table]")) {
    const table = payload.tables[section.dataset.table];
    const values = table.frame ? frames[table.frame].values : table.values;
    const all = table.rows ?? Array.from({ length: table.length }, (_, i) => i);
    const at = (i, c) => values[c.key][i];
    const text = new Map(all.map((i) => [i,
      table.columns.map((c) => show(at(i, c), c)).join("\u0001").toLowerCase()]));
    const body = section.querySelector("tbody");
    const heads = [...section.querySelectorAll("th")];
    const filter = section.querySelector("input");
    const status = section.querySelector("output");
    let sorted = null, rising = true, wanted = [];
    const cellOf = (i, c, k) => {
      const cell = element(k ? "td" : "th", "", c.kind + " " + c.key);
      if (!k) cell.scope = "row";
      const value = show(at(i, c), c);
      if (c.kind === "verdict" && value) cell.append(badge(value));
      else if (!k && dialog) {
        const link = element("a", value);
        link.href = hashOf(value, table.frame === "runs" ? values.seed[i] : null);
        cell.append(link);
      } else cell.textContent = value;
      return cell;
    };
    const draw = () => {
      const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      wanted = all.filter((i) => words.every((word) => text.get(i).includes(word)));
      if (sorted !== null) {
        const key = (i) => at(i, table.columns[sorted]);
        const empty = (v) => v === null || v === "";
        wanted.sort((i, j) => {
          const a = key(i), b = key(j);
          if (empty(a) || empty(b)) return empty(a) - empty(b) || i - j;
          const order = typeof a === "number" && typeof b === "number"
            ? a - b : collator.compare(String(a), String(b));
          return (rising ? order : -order) || i - j;
        });
      }
      body.replaceChildren(...wanted.slice(0, limit).map((i) => {
        const row = element("tr");
        row.append(...table.columns.map((c, k) => cellOf(i, c, k)));
        return row;
      }));
      const shown = Math.min(limit, wanted.length);
      status.textContent = wanted.length === all.length && shown === wanted.length
        ? "" : `${shown.toLocaleString("en")} of ${all.length.toLocaleString("en")} rows`
        + (shown < wanted.length ? ` (${wanted.length.toLocaleString("en")} match)` : "");
    };
    heads.slice(0, table.columns.length).forEach((head, k) => {
      head.querySelector("button").addEventListener("click", () => {
        rising = sorted === k ? !rising : true;
        sorted = k;
        heads.forEach((h) => h.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", rising ? "ascending" : "descending");
        draw();
      });
    });
    filter.addEventListener("input", draw);
    section.querySelector("[data-save]").addEventListener("click", () => {
      const keys = Object.keys(values);
      const lines = [keys, ...wanted.map((i) => keys.map((key) => values[key][i]))];
      save(section.dataset.table + ".csv",
        lines.map((line) => line.map(quote).join(",")).join("\r\n") + "\r\n");
    });
    draw();
    section.classList.add("live");
  }

  // ---- charts ----
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const scheme = () => (dark.matches ? "dark" : "light");
  const config = {
    responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
    scrollZoom: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  const paint = (plot, theme) => {
    const { data, layout } = payload.figures[plot.dataset.figure];
    const narrow = plot.clientWidth < 480;
    const size = narrow ? { margin: { ...layout.margin, r: Math.min(layout.margin.r, plot.clientWidth * 0.34) } } : {};
    return Plotly.react(plot, data,
      { ...layout, ...size, template: payload.themes[theme], autosize: true },
      { ...config, toImageButtonOptions: { format: "svg", filename: plot.dataset.figure } });
  };
  // Points that lead to a net, in the order of the data.
  const pointsOf = (plot) => plot.data.flatMap((trace, curveNumber) =>
    (trace.customdata ?? []).map((link, pointNumber) => ({ curveNumber, pointNumber, link })));
  const link = (plot) => {
    let place = -1;
    plot.tabIndex = 0;
    plot.setAttribute("aria-describedby", "pick");
    plot.on("plotly_click", ({ points }) => {
      const found = points.find((point) => point.customdata);
      if (found) choose(...found.customdata);
    });
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const points = pointsOf(plot);
      if (!points.length || event.target !== plot) return;
      if (event.key === "Enter" && place >= 0) choose(...points[place].link);
      if (!step) return;
      event.preventDefault();
      place = place < 0 ? 0 : (place + step + points.length) % points.length;
      const { curveNumber, pointNumber, link: [variant, seed] } = points[place];
      const { xaxis, yaxis } = plot.data[curveNumber];
      Plotly.Fx.hover(plot, [{ curveNumber, pointNumber }], [(xaxis || "x") + (yaxis || "y")]);
      $("said").textContent = variant + (seed === null ? "" : `, seed ${seed}`);
    });
    plot.addEventListener("blur", () => { place = -1; Plotly.Fx.unhover(plot); });
  };
  const plots = [...document.querySelectorAll(".plot")];
  if (plots.length) {
    const source = new Blob([await unpack("plotly")], { type: "text/javascript" });
    const loader = document.createElement("script");
    loader.src = URL.createObjectURL(source);
    await new Promise((done, failed) => {
      loader.onload = done;
      loader.onerror = failed;
      document.head.append(loader);
    });
    URL.revokeObjectURL(loader.src);
    const paintAll = (theme) => Promise.all(plots.map((plot) => paint(plot, theme)));
    for (const plot of plots) {
      await paint(plot, scheme());
      if (dialog) link(plot);
      await new Promise((done) => setTimeout(done));
    }
    dark.addEventListener("change", () => { paintAll(scheme()); openChosen(); });
    addEventListener("beforeprint", () => {
      document.querySelectorAll("details").forEach((d) => { d.open = true; });
      paintAll("light");
    });
    addEventListener("afterprint", () => paintAll(scheme()));
  }
  openChosen();
  document.body.dataset.ready = "yes";
})();
