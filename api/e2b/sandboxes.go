package e2b

import (
	"cmp"
	"context"
	"net/http"
	"strconv"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// Lives that a client gets without asking, in seconds.
const (
	defaultLifeV1 = 15
	defaultLife   = 300
)

// newSandbox is the body of a creation.
type newSandbox struct {
	TemplateID      string             `json:"templateID"`
	Timeout         *int64             `json:"timeout"` // seconds
	Metadata        map[string]string  `json:"metadata"`
	EnvVars         map[string]string  `json:"envVars"`
	Secure          bool               `json:"secure"`
	Internet        *bool              `json:"allow_internet_access"`
	AutoPause       bool               `json:"autoPause"`
	AutoPauseMemory *bool              `json:"autoPauseMemory"`
	AutoResume      *autoResume        `json:"autoResume"`
	Network         *networkConfig     `json:"network"`
	Volumes         []node.VolumeMount `json:"volumeMounts"`
	IAM             *struct{}          `json:"iam"`
}

// autoResume is {"enabled": true}, or {"policy": "any"} from older clients.
type autoResume struct {
	Enabled bool   `json:"enabled"`
	Policy  string `json:"policy"`
}

// errNoMemory is the answer to who would throw away the memory of a sandbox that was paused with it.
var errNoMemory = invalid("the sandbox was paused with its memory, and resumes with it")

// metadataRuntime is the key of metadata that chooses a runtime, for which E2B's
// API has no word: "microvm".
const metadataRuntime = "atoll.runtime"

// metadataIdle is the key of metadata that says after how long without use a
// sandbox is paused until the next use: "15m".
const metadataIdle = "atoll.idle"

// request turns the body into what the node understands. It does not say from
// what the sandbox is made.
func (b *newSandbox) request(team string, defaultSeconds int64) (node.CreateRequest, error) {
	req := node.CreateRequest{
		Team: team, Metadata: b.Metadata, Env: b.EnvVars, Secure: b.Secure, Volumes: b.Volumes,
		PrivateAccess: b.Network != nil && !valueOr(b.Network.AllowPublicTraffic, true),
	}
	if b.TemplateID == "" {
		return req, invalid("templateID is required")
	}
	if b.IAM != nil {
		return req, invalid("workload identity tokens are not supported by this server")
	}
	var err error
	if req.Timeout, err = life(valueOr(b.Timeout, defaultSeconds)); err != nil {
		return req, err
	}
	if name := b.Metadata[metadataRuntime]; name != "" {
		req.Runtimes = []string{name}
	}
	if text := b.Metadata[metadataIdle]; text != "" {
		if req.Lifecycle.Idle, err = time.ParseDuration(text); err != nil || req.Lifecycle.Idle < 0 {
			return req, invalid("metadata " + metadataIdle + ": write for example 15m")
		}
	}
	if b.AutoPause {
		req.Lifecycle.OnTimeout = node.TimeoutPause
	}
	if r := b.AutoResume; r != nil {
		req.Lifecycle.AutoResume = r.Enabled || r.Policy == "any"
	}
	if b.AutoPause && !valueOr(b.AutoPauseMemory, true) {
		if req.Lifecycle.OnTimeout = node.TimeoutShelve; req.Lifecycle.AutoResume {
			return req, invalid("autoResume needs the memory: a sandbox that was paused without it is resumed explicitly")
		}
	}
	policy, err := b.Network.policy(b.Internet)
	if err != nil {
		return req, err
	}
	req.Policy = &policy
	req.Labels, err = b.Network.labels(b.Internet)
	return req, err
}

func (a *api) createV1(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	a.create(w, r, key, defaultLifeV1, false)
}

// createV2 always gives the guest a token; the first generation only when asked.
func (a *api) createV2(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	a.create(w, r, key, defaultLife, true)
}

func (a *api) create(w http.ResponseWriter, r *http.Request, key tenant.Key, seconds int64, secure bool) {
	var body newSandbox
	if !a.decode(w, r, &body) {
		return
	}
	body.Secure = body.Secure || secure
	req, err := body.request(key.Team, seconds)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	sb, err := a.launch(r.Context(), key.Team, body.TemplateID, req)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusCreated, a.created(sb))
}

// launch makes a sandbox from what the client calls a template: a template that
// the team may use, or one of its snapshots. Nothing else of the host's can be
// named this way.
func (a *api) launch(ctx context.Context, team, ref string, req node.CreateRequest) (node.Sandbox, error) {
	t, build, err := a.findTemplate(ctx, team, ref)
	if sandbox.Is(err, sandbox.NotFound) {
		snap, ok, e := a.findSnapshot(ctx, team, ref)
		if e != nil || !ok {
			return node.Sandbox{}, cmp.Or(e, err)
		}
		req.Labels[labelTemplate] = snapshotID(snap)
		if req.Metadata == nil {
			req.Metadata = map[string]string{} // the snapshot's own are not for its children
		}
		return a.node.Restore(ctx, snap.ID, req)
	}
	if err != nil {
		return node.Sandbox{}, err
	}
	req.Image = t.ID
	if build != "" {
		req.Image += ":" + build
	}
	return a.node.Create(ctx, req)
}

// lookup returns the team's sandbox with exactly this ID. One of another team
// is as absent as one that never was.
func (a *api) lookup(ctx context.Context, key tenant.Key, ref string) (node.Sandbox, error) {
	id := shortID(ref)
	sb, err := a.node.Get(ctx, id)
	if err != nil && !sandbox.Is(err, sandbox.NotFound) && !sandbox.Is(err, sandbox.Invalid) {
		return sb, err
	}
	// The node also finds names and prefixes, which this API does not have.
	if err != nil || sb.ID != id || sb.Team != key.Team || sb.Pooled != "" || !exists(sb.State) {
		return node.Sandbox{}, notFound("sandbox %q doesn't exist or you don't have access to it", ref)
	}
	return sb, nil
}

// onSandbox runs fn for the sandbox that the path names and answers its error.
func (a *api) onSandbox(w http.ResponseWriter, r *http.Request, key tenant.Key, fn func(node.Sandbox) error) {
	sb, err := a.lookup(r.Context(), key, r.PathValue("id"))
	if err == nil {
		err = fn(sb)
	}
	if err != nil {
		a.fail(w, r, err)
	}
}

func (a *api) getSandbox(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		writeJSON(w, http.StatusOK, a.detail(sb))
		return nil
	})
}

func (a *api) killSandbox(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		if err := a.node.Remove(r.Context(), sb.ID); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}

// listRunning is the first generation's list: running sandboxes, no pages.
func (a *api) listRunning(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	metadata, err := parseMetadata(r.URL.Query().Get("metadata"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	all, err := a.node.List(r.Context(), node.Filter{Team: key.Team, Metadata: metadata, States: []sandbox.State{sandbox.Running}})
	if err != nil {
		a.fail(w, r, err)
		return
	}
	out := make([]listedSandbox, 0, len(all))
	for _, sb := range all {
		out = append(out, a.listed(sb))
	}
	writeJSON(w, http.StatusOK, out)
}

func (a *api) listSandboxes(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	q, err := parseListQuery(r.URL.Query(), key.Team)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	all, err := a.node.List(r.Context(), q.filter)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	template := r.URL.Query().Get("template")
	kept, running := all[:0], 0
	for _, sb := range all {
		if sb.StartedAt.Before(q.since) || template != "" && !a.isFrom(r.Context(), key.Team, sb, template) {
			continue
		}
		kept = append(kept, sb)
		if sb.State == sandbox.Running {
			running++
		}
	}
	part, token := page(kept, func(sb node.Sandbox) cursor { return cursor{at: sb.StartedAt, id: sb.ID} }, q.after, q.limit, q.ascending)
	out := make([]listedSandbox, 0, len(part))
	for _, sb := range part {
		out = append(out, a.listed(sb))
	}
	w.Header().Set("X-Total-Running", strconv.Itoa(running))
	writePage(w, token, out)
}

// writePage answers with one page; an absent token says that it is the last.
func writePage(w http.ResponseWriter, token string, items any) {
	if token != "" {
		w.Header().Set("X-Next-Token", token)
	}
	writeJSON(w, http.StatusOK, items)
}

// connect returns the sandbox, resumed if it was paused; it only ever extends a
// life.
func (a *api) connect(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Timeout *int64 `json:"timeout"`
		Memory  *bool  `json:"memory"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		if !valueOr(body.Memory, true) && a.holdsMemory(r.Context(), sb) {
			return errNoMemory
		}
		d, err := life(valueOr(body.Timeout, defaultLife))
		if err != nil {
			return err
		}
		sb, resumed, err := a.node.Connect(r.Context(), sb.ID, d)
		if err != nil {
			return err
		}
		status := http.StatusOK
		if resumed {
			status = http.StatusCreated
		}
		writeJSON(w, status, a.created(sb))
		return nil
	})
}

// resume is the first generation's connect: only for paused sandboxes.
func (a *api) resume(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Timeout *int64 `json:"timeout"`
		Memory  *bool  `json:"memory"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		if sb.State != sandbox.Paused {
			return sandbox.Errorf("e2b.resume", sandbox.Conflict, "", "sandbox %s is already running", sb.ID)
		}
		if !valueOr(body.Memory, true) && a.holdsMemory(r.Context(), sb) {
			return errNoMemory
		}
		d, err := life(valueOr(body.Timeout, defaultLifeV1))
		if err != nil {
			return err
		}
		sb, _, err = a.node.Connect(r.Context(), sb.ID, d)
		if err != nil {
			return err
		}
		writeJSON(w, http.StatusCreated, a.created(sb))
		return nil
	})
}

// holdsMemory reports whether a sandbox is paused and goes on from its memory when it is resumed.
func (a *api) holdsMemory(ctx context.Context, sb node.Sandbox) bool {
	if sb.State != sandbox.Paused || sb.Suspended == "" {
		return sb.State == sandbox.Paused
	}
	s, err := a.node.GetSnapshot(ctx, sb.Suspended)
	return err != nil || s.Memory
}

func (a *api) pause(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Memory *bool `json:"memory"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	mode := node.PauseDisk
	if !valueOr(body.Memory, true) {
		mode = node.PauseFiles
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		if _, err := a.node.Pause(r.Context(), sb.ID, mode); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}

func (a *api) setTimeout(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Timeout    *int64 `json:"timeout"`
		ExtendOnly bool   `json:"extendOnly"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	if body.Timeout == nil {
		a.reject(w, r, "timeout is required")
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		d, err := life(*body.Timeout)
		if err != nil {
			return err
		}
		if !body.ExtendOnly || extends(sb, d) {
			if err := a.node.SetTimeout(r.Context(), sb.ID, d); err != nil {
				return err
			}
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}

// extends reports whether a life of d from now ends later than the sandbox would.
func extends(sb node.Sandbox, d time.Duration) bool {
	return sb.EndAt != nil && time.Now().Add(d).After(*sb.EndAt)
}

// maxRefresh is the longest extension that a refresh can ask for, in seconds.
const maxRefresh = 3600

// refresh sees that the sandbox lives for at least the duration from now.
func (a *api) refresh(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Duration *int64 `json:"duration"` // seconds
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	seconds := valueOr(body.Duration, defaultLifeV1)
	if seconds < 0 || seconds > maxRefresh {
		a.reject(w, r, "duration must be between 0 and %d seconds", maxRefresh)
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		d := time.Duration(seconds) * time.Second
		if extends(sb, d) {
			if err := a.node.SetTimeout(r.Context(), sb.ID, d); err != nil {
				return err
			}
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}

// maxForks bounds one fork request.
const maxForks = 100

// forkResult is one wanted child: the sandbox, or why there is none.
type forkResult struct {
	Sandbox *createdSandbox `json:"sandbox,omitempty"`
	Error   *apiError       `json:"error,omitempty"`
}

func (a *api) fork(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Count   *int   `json:"count"`
		Timeout *int64 `json:"timeout"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	count := valueOr(body.Count, 1)
	if count < 1 || count > maxForks {
		a.reject(w, r, "count must be between 1 and %d", maxForks)
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		d, err := life(valueOr(body.Timeout, defaultLife))
		if err != nil {
			return err
		}
		if sb.State != sandbox.Running {
			return sandbox.Errorf("e2b.fork", sandbox.Conflict, "", "sandbox %s is not running", sb.ID)
		}
		children, err := a.node.Fork(r.Context(), sb.ID, count, node.CreateRequest{
			Team: key.Team, Timeout: d, Secure: sb.GuestToken != "", PrivateAccess: !sb.PublicTraffic,
		})
		if err != nil {
			return err
		}
		out := make([]forkResult, len(children))
		for i, c := range children {
			if c.Err != nil {
				e := toAPIError(c.Err)
				out[i].Error = &e
				continue
			}
			made := a.created(*c.Sandbox)
			out[i].Sandbox = &made
		}
		writeJSON(w, http.StatusCreated, out)
		return nil
	})
}

// updateNetwork replaces what the sandbox may reach. Fields that are left out
// are cleared, as the API has it.
func (a *api) updateNetwork(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	var body networkConfig
	if !a.decode(w, r, &body) {
		return
	}
	a.onSandbox(w, r, key, func(sb node.Sandbox) error {
		policy, err := body.policy(body.Internet)
		if err != nil {
			return err
		}
		if sb.State != sandbox.Running {
			return sandbox.Errorf("e2b.updateNetwork", sandbox.Conflict, "", "sandbox %s is not running", sb.ID)
		}
		policy.RateLimit = sb.Policy.RateLimit // the API has no word for it
		if err := a.node.UpdateNetwork(r.Context(), sb.ID, policy); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
}
