package e2b

import (
	"net/http"
	"slices"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/tenant"
)

// listTeams lists the one team that the caller's key belongs to.
func (a *api) listTeams(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	type team struct {
		TeamID    string `json:"teamID"`
		Name      string `json:"name"`
		APIKey    string `json:"apiKey"` // the caller's own: no other is known here
		IsDefault bool   `json:"isDefault"`
	}
	writeJSON(w, http.StatusOK, []team{{TeamID: key.Team, Name: key.Team, APIKey: presentedKey(r), IsDefault: true}})
}

// teamMetric is a team's use at one moment.
type teamMetric struct {
	Timestamp  time.Time `json:"timestamp"`
	Unix       int64     `json:"timestampUnix"`
	Concurrent int       `json:"concurrentSandboxes"`
	StartRate  float64   `json:"sandboxStartRate"` // a second, over the step before the moment
}

const (
	teamMetricSteps  = 60        // moments that an interval is cut into
	teamMetricWindow = time.Hour // without a start: how far back the records of ended sandboxes reach
)

// teamUse computes the metrics of an interval from the sandboxes' records.
func teamUse(records []node.Sandbox, start, end time.Time) []teamMetric {
	step := max(end.Sub(start)/teamMetricSteps, time.Second).Truncate(time.Second)
	var out []teamMetric
	for at := end; !at.Before(start) && len(out) <= teamMetricSteps; at = at.Add(-step) {
		m := teamMetric{Timestamp: at.UTC(), Unix: at.Unix()}
		started := 0
		for _, sb := range records {
			if sb.CreatedAt.After(at) {
				continue
			}
			if ended(sb).After(at) {
				m.Concurrent++
			}
			if sb.CreatedAt.After(at.Add(-step)) {
				started++
			}
		}
		m.StartRate = float64(started) / step.Seconds()
		out = append(out, m)
	}
	slices.Reverse(out)
	return out
}

// ended is when a sandbox stopped to count: at its end or pause, or not yet.
func ended(sb node.Sandbox) time.Time {
	return valueOr(sb.EndedAt, valueOr(sb.PausedAt, farFuture))
}

// teamInterval reads which team and interval are asked for, and answers if it
// cannot.
func (a *api) teamInterval(w http.ResponseWriter, r *http.Request, key tenant.Key) ([]teamMetric, bool) {
	if !a.ownTeam(w, r, key, r.PathValue("team")) {
		return nil, false
	}
	start, end, err := parseInterval(r.URL.Query(), time.Second)
	if err != nil {
		a.fail(w, r, err)
		return nil, false
	}
	if end.IsZero() {
		end = time.Now()
	}
	if start.IsZero() {
		start = end.Add(-teamMetricWindow)
	}
	all, err := a.node.List(r.Context(), node.Filter{Team: key.Team, All: true})
	if err != nil {
		a.fail(w, r, err)
		return nil, false
	}
	return teamUse(all, start, end), true
}

func (a *api) teamMetrics(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	if m, ok := a.teamInterval(w, r, key); ok {
		writeJSON(w, http.StatusOK, m)
	}
}

func (a *api) teamMetricsMax(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	metric := r.URL.Query().Get("metric")
	if metric != "concurrent_sandboxes" && metric != "sandbox_start_rate" {
		a.reject(w, r, "metric must be concurrent_sandboxes or sandbox_start_rate")
		return
	}
	all, ok := a.teamInterval(w, r, key)
	if !ok {
		return
	}
	out := struct {
		Timestamp time.Time `json:"timestamp"`
		Unix      int64     `json:"timestampUnix"`
		Value     float64   `json:"value"`
	}{}
	for i, m := range all {
		v := m.StartRate
		if metric == "concurrent_sandboxes" {
			v = float64(m.Concurrent)
		}
		if i == 0 || v > out.Value {
			out.Timestamp, out.Unix, out.Value = m.Timestamp, m.Unix, v
		}
	}
	writeJSON(w, http.StatusOK, out)
}
