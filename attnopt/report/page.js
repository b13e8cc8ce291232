"use strict";
(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const one = (id) => document.getElementById(id);
  const sites = all("tbody.site");
  const texts = sites.map((site) => site.textContent.toLowerCase());
  const chosen = all("select[data-filter]");

  function filter() {
    const words = one("text").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    sites.forEach((site, i) => {
      const fits = words.every((word) => texts[i].includes(word)) &&
        chosen.every((c) => !c.value || site.dataset[c.dataset.filter] === c.value);
      site.hidden = !fits;
      shown += fits;
    });
    one("count").textContent = `${shown} of ${sites.length} rows shown`;
  }

  const system = matchMedia("(prefers-color-scheme: dark)");
  let theme = system.matches ? "dark" : "light";
  function paint() {
    document.documentElement.dataset.theme = theme;
    one("theme").setAttribute("aria-pressed", String(theme === "dark"));
  }
  system.addEventListener("change", (event) => {
    theme = event.matches ? "dark" : "light";
    paint();
  });
  one("theme").addEventListener("click", () => {
    theme = theme === "dark" ? "light" : "dark";
    paint();
  });
  one("controls").addEventListener("submit", (event) => event.preventDefault());
  one("text").addEventListener("input", filter);
  chosen.forEach((c) => c.addEventListener("change", filter));
  const open = (state) => () => all("details").forEach((d) => { d.open = state; });
  one("expand").addEventListener("click", open(true));
  one("collapse").addEventListener("click", open(false));
  all("a[href^='#kernel-']").forEach((link) => link.addEventListener("click", () => {
    const kernel = one(link.getAttribute("href").slice(1));
    if (kernel) kernel.open = true;
  }));
  paint();
  filter();
})();
