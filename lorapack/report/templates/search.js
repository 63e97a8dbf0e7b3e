// The search over the table of modules. Without it the table is there in full.
const box = document.getElementById("search");
const rows = [...document.querySelectorAll("#modules tbody tr")];
const told = document.getElementById("found");
box.closest("form").hidden = false;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/);
  let left = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    left += row.hidden ? 0 : 1;
  }
  told.textContent = `${left} of ${rows.length} modules`;
});
