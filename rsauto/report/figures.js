// The figures, each drawn when it comes near the window: the page can be used before they are there.
(function () {
  const [figures, texts] = ["figures", "texts"].map(
    (id) => JSON.parse(document.getElementById(id).textContent),
  );
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const plots = Object.fromEntries(
    Object.keys(figures).map((key) => [key, document.getElementById("plot-" + key)]),
  );
  const drawn = new Set();
  const settings = {
    responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    // By default plotly offers to upload the chart; a report stays where it is.
    showSendToCloud: false, plotlyServerURL: "",
  };

  // Plotly knows no style sheet: its text follows the page's colours by hand, and the darkest blue
  // of the palette, which a dark page would swallow, is lightened.
  const BLUE = "#0072B2", LIGHT_BLUE = "#2E93DB";

  // Texts of points stand in the page once, however many figures show them.
  for (const { data } of Object.values(figures)) {
    for (const trace of data) {
      if (typeof trace.text?.[0] === "number") trace.text = trace.text.map((at) => texts[at]);
    }
  }

  // Two figures fit on a page of A4 or letter; one that has more rows than usual keeps its height.
  const PAPER = { width: 660, height: 340, usual: 460 };

  function dressed(figure, isDark, onPaper) {
    const ink = isDark ? "#c9d0d8" : "#3a424c";
    const card = isDark ? "#1c2026" : "#ffffff";
    const { font, hoverlabel, xaxis, yaxis, ...rest } = figure.layout;
    const height = rest.height > PAPER.usual ? rest.height : PAPER.height;
    return {
      data: isDark ? figure.data.map(lightened) : figure.data,
      layout: {
        ...rest,
        ...(onPaper ? { width: PAPER.width, height, autosize: false } : {}),
        font: { ...font, color: ink },
        hoverlabel: { ...hoverlabel, bgcolor: card, font: { color: ink } },
        xaxis: { ...xaxis, linecolor: ink },
        yaxis: { ...yaxis, linecolor: ink },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: ink, activecolor: ink },
      },
    };
  }

  function lightened(trace) {
    const found = { ...trace };
    if (found.fillcolor === BLUE) found.fillcolor = LIGHT_BLUE;
    for (const part of ["line", "marker", "error_y"]) {
      if (found[part]?.color === BLUE) found[part] = { ...found[part], color: LIGHT_BLUE };
      if (found[part]?.line?.color === BLUE) {
        found[part] = { ...found[part], line: { ...found[part].line, color: LIGHT_BLUE } };
      }
    }
    return found;
  }

  // Plotly takes longer to start than all else on the page: not before there is something to draw.
  function start() {
    const script = document.createElement("script");
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
  }

  function draw(key, isDark, onPaper) {
    if (drawn.has(key)) return null;
    if (!drawn.size) start();
    drawn.add(key);
    const { data, layout } = dressed(figures[key], isDark, onPaper);
    const made = Plotly.newPlot(plots[key], data, layout, settings);
    plots[key].on("plotly_click", (event) => {
      const said = /^trial (\d+)/.exec(event.points[0].text || "");
      if (said && window.showTrial) window.showTrial(Number(said[1]));
    });
    return made;
  }

  function dress(isDark, onPaper) {
    drawn.forEach((key) => {
      const { data, layout } = dressed(figures[key], isDark, onPaper);
      Plotly.react(plots[key], data, layout, settings);
    });
  }

  const watcher = new IntersectionObserver((entries) => {
    const near = entries.filter((entry) => entry.isIntersecting).map((entry) => entry.target);
    near.reduce((before, pane) => before.then(() => {
      watcher.unobserve(pane);
      draw(pane.dataset.key, dark.matches);
      return new Promise((next) => setTimeout(next));
    }), Promise.resolve()).then(() => {
      performance.mark("figures ready");
      document.documentElement.dataset.ready = "yes";
    });
  }, { rootMargin: "300px" });
  document.querySelectorAll(".pane").forEach((pane) => watcher.observe(pane));

  document.querySelectorAll(".switch").forEach((choice) => {
    choice.addEventListener("change", (event) => {
      choice.closest("figure").querySelectorAll(".pane").forEach((pane) => {
        pane.hidden = pane.dataset.key !== event.target.value;
      });
      // It may have been drawn for another width.
      if (!draw(event.target.value, dark.matches)) Plotly.Plots.resize(plots[event.target.value]);
    });
  });
  dark.addEventListener("change", (event) => dress(event.matches));
  // On paper every figure is there, those of a switch too, in the colours of a light page.
  window.addEventListener("beforeprint", () => {
    dress(false, true);
    document.querySelectorAll(".pane[hidden]").forEach((pane) => {
      pane.hidden = false;
      pane.dataset.paper = "only";
    });
    Object.keys(plots).forEach((key) => draw(key, false, true));
  });
  window.addEventListener("afterprint", () => {
    document.querySelectorAll(".pane[data-paper]").forEach((pane) => {
      pane.hidden = true;
      delete pane.dataset.paper;
    });
    dress(dark.matches);
    // A slow browser has not given the page its own width back yet.
    requestAnimationFrame(() => setTimeout(() => drawn.forEach((key) => {
      if (plots[key].offsetParent) Plotly.Plots.resize(plots[key]);
    })));
  });
})();
