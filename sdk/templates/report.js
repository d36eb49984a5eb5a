// Draws the figures with the page's own colours, again whenever the colour scheme or the width class changes.
(function () {
  "use strict";
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 640px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const options = { displayModeBar: false, responsive: true, displaylogo: false };

  // "var(--ink)" -> the value of that variable, everywhere in a figure.
  function filled(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[\w-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((each) => filled(each, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, filled(each, style)]));
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    for (const figure of figures) {
      const layout = narrow.matches ? { ...figure.layout, ...figure.narrow } : figure.layout;
      const data = figure.data.map(({ narrow_text, narrow_textposition, ...trace }) =>
        narrow.matches && narrow_text ? { ...trace, text: narrow_text, textposition: narrow_textposition } : trace);
      Plotly.react(figure.id, filled(data, style), filled(layout, style), options);
    }
  }

  draw();
  narrow.addEventListener("change", draw);
  dark.addEventListener("change", draw);
})();
