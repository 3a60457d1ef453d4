// List the endpoints of openapi.json.

const { paths, components } = await (await fetch("openapi.json")).json();

function create(tag, text = "", children = []) {
  const created = document.createElement(tag);
  created.textContent = text;
  created.append(...children);
  return created;
}

function table(caption, rows) {
  const cells = (row) => row.map((text, index) => {
    const cell = create(index ? "td" : "th", text);
    if (!index) cell.scope = "row";
    return cell;
  });
  return create("table", "", [create("caption", caption), ...rows.map((row) => create("tr", "", cells(row)))]);
}

/** Return the type of a schema in words. */
function type(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(type).filter((name) => name !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${type(schema.items)}`;
  const range = "minimum" in schema ? ` in [${schema.minimum}, ${schema.maximum}]` : "";
  return `${schema.type ?? "anything"}${range}`;
}

function endpoint(path, method, { description, parameters = [], requestBody, responses }) {
  const badge = create("span", method.toUpperCase());
  badge.className = "method";
  const parts = [create("h2", "", [badge, path]), create("p", description)];
  if (requestBody) parts.push(create("p", `Body: ${Object.keys(requestBody.content).join(" or ")}`));
  if (parameters.length) {
    parts.push(table("Parameters", parameters.map(({ name, schema, description: text }) => (
      [name, `${type(schema)}, default ${schema.default}`, text ?? ""]
    ))));
  }
  parts.push(table("Answers", Object.entries(responses).map(([status, { description: text, content = {} }]) => {
    const answers = Object.entries(content).map(([kind, { schema }]) => (schema?.$ref ? type(schema) : kind));
    return [status, answers.join(", "), text];
  })));
  const section = create("section", "", parts);
  section.className = "card";
  return section;
}

const used = Object.entries(components.schemas).filter(([name]) => !name.includes("Validation"));
const schemas = create("section", "", [
  create("h2", "Answers in JSON"),
  ...used.map(([name, { description, properties }]) => table(
    `${name}: ${description ?? ""}`,
    Object.entries(properties).map(([key, schema]) => [key, type(schema), schema.description ?? ""]),
  )),
]);
schemas.className = "card";
document.getElementById("endpoints").append(
  ...Object.entries(paths).flatMap(([path, methods]) => (
    Object.entries(methods).map(([method, operation]) => endpoint(path, method, operation))
  )),
  schemas,
);
document.getElementById("example").textContent = [
  `curl -F image=@photo.jpg '${location.origin}/predict?threshold=0.5&masks=rle'`,
  `curl --data-binary @photo.jpg '${location.origin}/draw' --output drawn.jpg`,
].join("\n");
