//! Checks the layers of the program: each file imports only from its own layer and the layers below, and no files
//! import each other in a circle. The list of layers is the first table in ARCHITECTURE.md.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::Visit;

/// The path of a module below `crate`, for example `["lock", "proof"]`. Empty for `main`.
type Module = Vec<String>;

/// Returns the rows of ARCHITECTURE.md's first table, from the top. A row contains one layer, or several modules at the
/// same height.
fn layers() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let table = text.lines().skip_while(|line| !line.starts_with("| layer |")).skip(2);
    let rows = table.take_while(|line| line.starts_with('|')).map(|line| {
        let names = line.split('|').nth(1).unwrap();
        names.split(',').map(|name| name.trim().trim_matches('`').to_owned()).collect()
    });
    rows.collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns each module with its file.
fn files() -> BTreeMap<Module, PathBuf> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root().join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let relative = path.strip_prefix(root().join("src")).unwrap().with_extension("");
            let mut module: Module = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
            if module.last().is_some_and(|last| last == "mod" || last == "main") {
                module.pop();
            }
            files.insert(module, path);
        }
    }
    files
}

/// The paths within this crate that a file names outside its tests, in the form in which they are written.
#[derive(Default)]
struct Named {
    paths: Vec<Vec<String>>,
}

impl Named {
    fn note(&mut self, path: Vec<String>) {
        // `crate` alone is a visibility, as in `pub(crate)`.
        if path.len() > 1 && matches!(path[0].as_str(), "crate" | "super" | "self") {
            self.paths.push(path);
        }
    }

    fn note_use(&mut self, tree: &syn::UseTree, before: &[String]) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            syn::UseTree::Path(path) => self.note_use(&path.tree, &with(path.ident.to_string())),
            syn::UseTree::Name(name) => self.note(with(name.ident.to_string())),
            syn::UseTree::Rename(name) => self.note(with(name.ident.to_string())),
            syn::UseTree::Glob(_) => self.note(with("*".to_owned())),
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.note_use(tree, before)),
        }
    }

    /// Notes the paths among the tokens of a macro's arguments.
    fn note_tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(name) if path.is_empty() || colons == 2 => {
                    path.push(name.to_string());
                    colons = 0;
                }
                TokenTree::Punct(point) if point.as_char() == ':' => colons += 1,
                other => {
                    self.note(std::mem::take(&mut path));
                    colons = 0;
                    match other {
                        TokenTree::Group(group) => self.note_tokens(group.stream()),
                        TokenTree::Ident(name) => path.push(name.to_string()),
                        _ => {}
                    }
                }
            }
        }
        self.note(path);
    }
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let mut is_test = false;
        if attribute.path().is_ident("cfg") {
            let _ = attribute.parse_nested_meta(|meta| {
                is_test |= meta.path.is_ident("test");
                Ok(())
            });
        }
        is_test
    })
}

impl<'ast> Visit<'ast> for Named {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            syn::visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.note_use(&item.tree, &[]);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        self.note(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        self.note_tokens(item.tokens.clone());
        syn::visit::visit_macro(self, item);
    }
}

/// Returns the module to which `path`, written in `module`, leads. `None` if it leads to the same file.
fn target(module: &Module, path: &[String], files: &BTreeMap<Module, PathBuf>) -> Option<Module> {
    let mut absolute = match path[0].as_str() {
        "crate" => Vec::new(),
        _ => module.clone(),
    };
    for part in path {
        match part.as_str() {
            "crate" | "self" => {}
            "super" => drop(absolute.pop()),
            name => absolute.push(name.to_owned()),
        }
    }
    while !files.contains_key(&absolute) {
        absolute.pop();
    }
    (absolute != *module).then_some(absolute)
}

/// Returns the files that each file imports from.
fn imports() -> BTreeMap<Module, BTreeSet<Module>> {
    let files = files();
    let mut imports = BTreeMap::new();
    for (module, path) in &files {
        let parsed = syn::parse_file(&fs::read_to_string(path).unwrap()).unwrap();
        let mut named = Named::default();
        named.visit_file(&parsed);
        imports.insert(module.clone(), named.paths.iter().filter_map(|path| target(module, path, &files)).collect());
    }
    imports
}

fn shown(module: &Module) -> String {
    if module.is_empty() { "main".to_owned() } else { module.join("::") }
}

#[test]
fn no_file_imports_from_a_layer_above_its_own() {
    let layers = layers();
    let height = |module: &Module| {
        let layer = module.first().map_or("main", String::as_str);
        let found = layers.iter().position(|row| row.iter().any(|name| name == layer));
        found.unwrap_or_else(|| panic!("{layer} is in no row of ARCHITECTURE.md"))
    };
    let mut upward = Vec::new();
    for (module, imported) in imports() {
        let above = imported.iter().filter(|other| height(other) < height(&module));
        upward.extend(above.map(|other| format!("{} imports {}", shown(&module), shown(other))));
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

/// Asserts that no file for which `is_meant` is true imports a file for which `is_forbidden` is true.
#[track_caller]
fn assert_none_imports(is_meant: impl Fn(&Module) -> bool, is_forbidden: impl Fn(&Module) -> bool) {
    let mut found = Vec::new();
    let mut has_any = false;
    for (module, imported) in imports().iter().filter(|(module, _)| is_meant(module)) {
        has_any = true;
        let forbidden = imported.iter().filter(|other| is_forbidden(other));
        found.extend(forbidden.map(|other| format!("{} imports {}", shown(module), shown(other))));
    }
    assert!(has_any && found.is_empty(), "{found:#?}");
}

/// Whether the module is `path`, or is in it.
fn is_in(module: &Module, path: &[&str]) -> bool {
    module.len() >= path.len() && module.iter().zip(path).all(|(part, wanted)| part == wanted)
}

#[test]
fn the_process_that_supervises_terraform_cannot_send_a_request_to_aws() {
    assert_none_imports(
        |module| is_in(module, &["supervise"]) && !is_in(module, &["supervise", "keeper"]),
        |other| is_in(other, &["aws"]),
    );
}

#[test]
fn what_decides_about_locks_knows_nothing_of_processes_signals_or_terminals() {
    assert_none_imports(
        |module| is_in(module, &["lock"]),
        |other| is_in(other, &["sys"]) && !is_in(other, &["sys", "connections"]),
    );
}

/// Elsewhere, the code of every system is compiled and linted on each of them.
#[test]
fn only_sys_has_code_for_one_operating_system() {
    let depends = |path: &PathBuf| fs::read_to_string(path).unwrap().contains("target_os");
    let dependent: Vec<Module> =
        files().into_iter().filter(|(_, path)| depends(path)).map(|(module, _)| module).collect();
    let found: Vec<String> = dependent.iter().filter(|module| !is_in(module, &["sys"])).map(shown).collect();
    assert!(!dependent.is_empty() && found.is_empty(), "{found:#?}");
}

#[test]
fn each_layer_that_is_listed_exists() {
    let files = files();
    for layer in layers().concat() {
        assert!(layer == "main" || files.keys().any(|module| module.first() == Some(&layer)), "{layer}");
    }
}

#[test]
fn no_files_import_each_other_in_a_circle() {
    let mut left = imports();
    // A file that imports from none of the remaining files is in no circle.
    while let Some(free) = left.iter().find(|(_, imported)| imported.is_empty()).map(|(module, _)| module.clone()) {
        left.remove(&free);
        for imported in left.values_mut() {
            imported.remove(&free);
        }
    }
    let circle: Vec<String> = left
        .iter()
        .map(|(module, imported)| {
            format!("{} imports {}", shown(module), imported.iter().map(shown).collect::<Vec<_>>().join(", "))
        })
        .collect();
    assert!(circle.is_empty(), "in a circle, or above one: {circle:#?}");
}
