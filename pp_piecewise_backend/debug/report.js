const folds = () => document.querySelectorAll("details.repeat");
const button = document.getElementById("unfold");
if (button) {
  if (!folds().length) { button.remove(); }
  button.addEventListener("click", () => {
    const open = ![...folds()].every((fold) => fold.open);
    folds().forEach((fold) => { fold.open = open; });
  });
  const label = () => {
    button.textContent = [...folds()].every((fold) => fold.open) ? "fold all" : "unfold all";
  };
  folds().forEach((fold) => fold.addEventListener("toggle", label));
}
const show = (id) => {
  const step = document.getElementById(id);
  if (step instanceof HTMLDetailsElement) { step.open = true; step.scrollIntoView({ behavior: "smooth" }); }
};
document.querySelectorAll("a.box").forEach((box) => box.addEventListener("click", (event) => {
  event.preventDefault();
  event.stopPropagation();
  show(box.getAttribute("href").slice(1));
}));
addEventListener("hashchange", () => show(location.hash.slice(1)));
show(location.hash.slice(1));
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach((details) => { details.open = true; });
});
addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));
