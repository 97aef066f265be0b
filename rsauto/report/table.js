// The list of trials: sorted by a column's head, filtered by words and comparisons.
(function () {
  const table = document.getElementById("trials");
  if (!table) return;
  const form = document.getElementById("filter");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const names = heads.map((head) => head.dataset.name);
  const texts = rows.map(() => null);
  const columns = heads.map(() => null);

  // Both are read from the page when they are first asked for.
  function text(n) {
    return texts[n] ??= rows[n].textContent.toLowerCase();
  }

  // Cells of a column: numbers as they were, not as they are worded; null where there is none.
  function column(at) {
    return columns[at] ??= rows.map((row) => {
      const cell = row.cells[at];
      const number = cell.getAttribute("data-v");
      if (number !== null) return Number(number);
      return cell.textContent === "-" ? null : cell.textContent;
    });
  }

  function compare(a, b) {
    if (a === null || b === null) return (a === null) - (b === null);
    return typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true });
  }

  function sort(at) {
    const down = heads[at].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[at].setAttribute("aria-sort", down ? "descending" : "ascending");
    const values = column(at);
    const order = rows.map((_, n) => n).sort((a, b) => {
      if (values[a] === null || values[b] === null) return compare(values[a], values[b]);
      return down ? compare(values[b], values[a]) : compare(values[a], values[b]);
    });
    body.append(...order.map((n) => rows[n]));
  }

  const TESTS = {
    "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b,
    "=": (a, b) => a === b || String(a).toLowerCase() === String(b),
  };

  const UNITS = { "": 1, kib: 2 ** 10, mib: 2 ** 20, gib: 2 ** 30, k: 1e3, m: 1e6, g: 1e9 };

  // '0.5', '3e-4', '24GiB'; anything else is text.
  function bound(text) {
    const parts = /^([-+.\de]*\d)(kib|mib|gib|k|m|g|)$/.exec(text);
    const number = parts ? Number(parts[1]) * UNITS[parts[2]] : NaN;
    return Number.isNaN(number) ? text : number;
  }

  // 'rank>=32' compares a column, any other word must stand somewhere in the row.
  function term(word) {
    const parts = /^([a-z_0-9]+)(<=|>=|<|>|=)(.+)$/.exec(word);
    const at = parts ? names.indexOf(parts[1]) : -1;
    if (at < 0) return (n) => text(n).includes(word);
    const limit = bound(parts[3]);
    const values = column(at);
    return (n) => values[n] !== null && TESTS[parts[2]](values[n], limit);
  }

  function filter() {
    const words = form.elements.words.value.toLowerCase().trim().split(/\s+/).filter(Boolean);
    const tests = words.map(term);
    form.querySelectorAll("select").forEach((select) => {
      const values = select.value ? column(names.indexOf(select.name)) : null;
      if (values) tests.push((n) => values[n] === select.value);
    });
    let count = 0;
    rows.forEach((row, n) => {
      const fits = tests.every((test) => test(n));
      if (row.hidden === fits) row.hidden = !fits;
      count += fits;
    });
    form.elements.count.value = `${count} of ${rows.length} trials`;
  }

  // Where a figure's point leads: its trial's row.
  window.showTrial = function (number) {
    const row = rows[column(0).indexOf(number)];
    if (!row) return;
    if (row.hidden) {
      form.reset();
      filter();
    }
    rows.forEach((other) => other.classList.toggle("shown", other === row));
    row.scrollIntoView({ block: "center" });
  };

  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => sort(at)));
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
  performance.mark("table ready");
})();
