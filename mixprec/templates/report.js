"use strict";
// Without this script every table and figure is there, one below the other. It adds tabs, sliders and sorting.
(() => {
  document.documentElement.classList.add("js");
  const make = (tag, attributes = {}, text = "") => {
    const one = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    one.textContent = text;
    return one;
  };
  const shows = new Map(); // a panel -> what brings it to the front

  let count = 0;
  for (const group of document.querySelectorAll("[data-tabs]")) {
    const panels = [...group.children].filter((one) => "tab" in one.dataset);
    if (panels.length < 2) continue;
    const list = make("div", { role: "tablist", "aria-label": group.dataset.tabs });
    const tabs = panels.map((panel) => {
      panel.id ||= `panel-${count++}`;
      const tab = make("button", { type: "button", role: "tab", id: `${panel.id}-tab`, "aria-controls": panel.id }, panel.dataset.tab);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      return tab;
    });
    const select = (place) => tabs.forEach((tab, at) => {
      tab.setAttribute("aria-selected", String(at === place));
      tab.tabIndex = at === place ? 0 : -1;
      panels[at].hidden = at !== place;
    });
    tabs.forEach((tab, at) => {
      tab.addEventListener("click", () => select(at));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const place = (to + tabs.length) % tabs.length;
        select(place);
        tabs[place].focus();
      });
      shows.set(panels[at], () => select(at));
    });
    list.append(...tabs);
    group.prepend(list);
    select(0);
  }

  // A link to a panel opens it.
  const follow = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (!target) return;
    for (let one = target; one; one = one.parentElement) shows.get(one)?.();
    target.scrollIntoView();
  };
  addEventListener("hashchange", follow);
  follow();

  for (const group of document.querySelectorAll("[data-slider]")) {
    const panels = [...group.children].filter((one) => "value" in one.dataset);
    if (panels.length < 2) continue;
    const id = `slider-${count++}`;
    const bar = make("div", { class: "slider" });
    const input = make("input", { type: "range", id, min: 0, max: panels.length - 1, step: 1, value: 0 });
    const output = make("output", { for: id });
    const select = () => {
      panels.forEach((panel, at) => { panel.hidden = at !== Number(input.value); });
      output.textContent = panels[input.value].dataset.value;
      input.setAttribute("aria-valuetext", output.textContent);
    };
    input.addEventListener("input", select);
    bar.append(make("label", { for: id }, group.dataset.slider), input, output);
    group.prepend(bar);
    select();
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    if (body.rows.length < 2) continue;
    const key = (row, column) => {
      const cell = row.cells[column];
      const text = cell.dataset.value ?? cell.textContent.trim();
      const value = text === "" ? NaN : Number(text);
      return { text, value, missing: text === "" || text === "—" || text === "None" };
    };
    heads.forEach((head, column) => {
      const button = make("button", { type: "button" }, head.textContent);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((one) => one.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [key(row, column), row]);
        rows.sort(([a], [b]) => {
          if (a.missing || b.missing) return a.missing - b.missing; // last, either way
          const order = Number.isNaN(a.value) || Number.isNaN(b.value) ? a.text.localeCompare(b.text) : a.value - b.value;
          return down ? -order : order;
        });
        body.append(...rows.map(([, row]) => row));
      });
      head.replaceChildren(button);
    });
  }

  // Over a heat map: which layer that is, and what every rule gave it.
  const WIDTH = {{ CELL[0] }}, HEIGHT = {{ CELL[1] }};
  for (const group of document.querySelectorAll("[data-schemes]")) {
    const [schemes, blocks, modules] = ["schemes", "blocks", "modules"].map((key) => group.dataset[key].split(" "));
    const readout = group.querySelector(".readout");
    readout.hidden = false;
    readout.textContent = "Point at a cell to read it.";
    const maps = [...group.querySelectorAll(".map")];
    const codes = new Map(maps.map((map) => [map, map.dataset.code.split("|")]));
    for (const map of maps) {
      map.addEventListener("pointermove", (event) => {
        const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(map.getScreenCTM().inverse());
        const column = Math.floor(at.x / WIDTH), row = Math.floor(at.y / HEIGHT);
        if (!(row in blocks && column in modules)) return;
        const beside = [...map.closest("[data-value]").querySelectorAll(".map")];
        for (const one of beside) {
          const mark = one.querySelector(".here");
          mark.setAttribute("x", column * WIDTH);
          mark.setAttribute("y", row * HEIGHT);
          mark.setAttribute("visibility", "visible");
        }
        const named = beside.map((one) => {
          const code = codes.get(one)[row][column];
          return `${one.dataset.rule} ${schemes[code] ?? (code === "m" ? "several" : "—")}`;
        });
        readout.textContent = `Block ${blocks[row]}, ${modules[column]}: ${named.join(", ")}`;
      });
    }
  }
})();
