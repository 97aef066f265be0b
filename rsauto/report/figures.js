// The figures: drawn one after the other, so that the page can be used before the last is there.
(function () {
  const figures = JSON.parse(document.getElementById("figures").textContent);
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

  // Plotly knows no style sheet: its text follows the page's colours by hand.
  function colours(isDark) {
    const ink = isDark ? "#c9d0d8" : "#3a424c";
    const card = isDark ? "#1c2026" : "#ffffff";
    return {
      "font.color": ink, "hoverlabel.bgcolor": card, "hoverlabel.font.color": ink,
      "xaxis.linecolor": ink, "yaxis.linecolor": ink,
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": ink, "modebar.activecolor": ink,
    };
  }

  function dressed(layout, isDark) {
    for (const [path, colour] of Object.entries(colours(isDark))) {
      const [last, ...above] = path.split(".").reverse();
      const part = above.reverse().reduce((inside, name) => (inside[name] ??= {}), layout);
      part[last] = colour;
    }
    return layout;
  }

  function draw(key, isDark) {
    if (drawn.has(key)) return null;
    drawn.add(key);
    const plot = plots[key];
    const figure = figures[key];
    const made = Plotly.newPlot(plot, figure.data, dressed(figure.layout, isDark), settings);
    plot.on("plotly_click", (event) => {
      const said = /^trial (\d+)/.exec(event.points[0].text || "");
      if (said && window.showTrial) window.showTrial(Number(said[1]));
    });
    return made;
  }

  function dress(isDark) {
    drawn.forEach((key) => Plotly.relayout(plots[key], colours(isDark)));
  }

  async function drawAll() {
    for (const key of Object.keys(plots)) {
      if (plots[key].closest(".pane").hidden) continue;
      await draw(key, dark.matches);
      await new Promise((next) => setTimeout(next));
    }
    performance.mark("figures ready");
    document.documentElement.dataset.ready = "yes";
  }

  document.querySelectorAll(".switch").forEach((choice) => {
    choice.addEventListener("change", (event) => {
      choice.closest("figure").querySelectorAll(".pane").forEach((pane) => {
        pane.hidden = pane.dataset.key !== event.target.value;
      });
      draw(event.target.value, dark.matches);
      Plotly.Plots.resize(plots[event.target.value]);
    });
  });
  dark.addEventListener("change", (event) => dress(event.matches));
  // On paper every figure of a switch is there, in the colours of a light page.
  window.addEventListener("beforeprint", () => {
    dress(false);
    document.querySelectorAll(".pane[hidden]").forEach((pane) => {
      pane.hidden = false;
      pane.dataset.paper = "only";
      draw(pane.dataset.key, false);
    });
  });
  window.addEventListener("afterprint", () => {
    document.querySelectorAll(".pane[data-paper]").forEach((pane) => {
      pane.hidden = true;
      delete pane.dataset.paper;
    });
    dress(dark.matches);
  });
  drawAll();
})();
