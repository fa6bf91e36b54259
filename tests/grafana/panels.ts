// The types of a dashboard and of the panels that shell/audit/grafana has. Grafana's own types leave the options of a
// panel open. Here they are those of the panel's type, and nothing that the types do not know is allowed.
import type {
  Dashboard, FieldColor, FieldConfig, GraphFieldConfig, MatcherConfig, Panel, TableCellOptions, TableFieldOptions,
  ThresholdsConfig, ValueMapping,
} from "@grafana/schema";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as timeseries
  from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";

/** A value as it is in JSON: an enum of texts is one of these texts. */
type Json<T> = T extends string ? `${T}` : T extends object ? { [K in keyof T]: Json<T[K]> } : T;

/** One setting that an override changes, by the name that Grafana gives it. */
type Property =
  | { id: "color"; value: FieldColor }
  | { id: "custom.cellOptions"; value: TableCellOptions }
  | { id: "mappings"; value: ValueMapping[] }
  | { id: "thresholds"; value: ThresholdsConfig }
  | { id: "unit"; value: string };

type PanelOf<Type, Options, Field> = Omit<Panel, "type" | "options" | "fieldConfig"> & {
  type: Type;
  options: Partial<Options>;
  fieldConfig: {
    defaults: Omit<FieldConfig, "custom"> & { custom?: Partial<Field> };
    overrides: { matcher: MatcherConfig; properties: Property[] }[];
  };
};

export type StatPanel = Json<PanelOf<"stat", stat.Options, never>>;
export type TablePanel = Json<PanelOf<"table", table.Options, TableFieldOptions>>;
export type TimeseriesPanel = Json<PanelOf<"timeseries", timeseries.Options, GraphFieldConfig>>;
export type Settings = Json<Omit<Dashboard, "panels">>;
