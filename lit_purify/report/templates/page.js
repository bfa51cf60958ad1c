// Filters of the gallery. Without it everything is shown.
const form = document.querySelector(".filters");
if (form) {
  const gallery = document.querySelector(".gallery");
  const figures = [...gallery.querySelectorAll("figure")];
  const update = () => {
    const chosen = name => new Set([...form.querySelectorAll(`[name=${name}]:checked`)].map(box => box.value));
    const wanted = Object.fromEntries(["outcome", "defense", "attack"].map(name => [name, chosen(name)]));
    for (const figure of figures) {
      figure.hidden = !Object.entries(wanted).every(([name, values]) => values.has(figure.dataset[name]));
    }
    form.querySelector("output").textContent = `${figures.filter(f => !f.hidden).length} of ${figures.length} shown`;
    gallery.style.setProperty("--mask", form.elements.mask.value / 100);
  };
  form.addEventListener("input", update);
  form.hidden = false;
  // A browser may bring back what was chosen before.
  update();
}
