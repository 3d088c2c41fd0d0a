package native

import (
	"net/http"
	"strconv"
	"time"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/sandbox"
	"github.com/atoll-run/atoll/tenant"
)

// PauseRequest says how to pause.
type PauseRequest struct {
	Mode node.PauseMode `json:"mode,omitempty"` // default: frozen
}

// NameRequest carries a name: a new one for a sandbox, or a snapshot's.
type NameRequest struct {
	Name string `json:"name,omitempty"`
}

// TimeoutRequest moves the end of a sandbox to now + Timeout; 0 lifts it.
type TimeoutRequest struct {
	Timeout time.Duration `json:"timeout"`
}

// ForkRequest asks for Count children.
type ForkRequest struct {
	Count   int                `json:"count"`
	Request node.CreateRequest `json:"request"` // what differs from the parent
}

// Fork is one child, or why there is none.
type Fork struct {
	Sandbox *node.Sandbox `json:"sandbox,omitempty"`
	Problem *Problem      `json:"problem,omitempty"`
}

// PoolRequest sets how many sandboxes a pool keeps ready.
type PoolRequest struct {
	Size int `json:"size"`
}

// KeyRequest asks for a key.
type KeyRequest struct {
	Team string `json:"team,omitempty"`
	Name string `json:"name,omitempty"`
}

// routes is the whole API, in the order in which it is described.
func routes() []route {
	var all []route
	all = append(all, hostRoutes()...)
	all = append(all, sandboxRoutes()...)
	all = append(all, snapshotRoutes()...)
	all = append(all, worktreeRoutes()...)
	all = append(all, imageRoutes()...)
	all = append(all, templateRoutes()...)
	all = append(all, nodeRoutes()...)
	return all
}

func hostRoutes() []route {
	return []route{
		on("GET", "/api/v1/info", "What this node is and has", func(c *call, _ none) (node.Info, error) {
			return c.backend.Info(c.ctx)
		}),
		on("GET", "/api/v1/runtimes", "The runtimes and what each can do", func(c *call, _ none) ([]node.RuntimeInfo, error) {
			return c.backend.Runtimes(c.ctx)
		}),
		{method: "GET", path: "/api/v1/events", summary: "What happens to sandboxes, as it happens", query: []string{"since"},
			out: bodyType[sandbox.Event](), stream: true, serve: func(c *call) error {
				since, err := strconv.ParseUint("0"+c.r.URL.Query().Get("since"), 10, 64)
				if err != nil {
					return sandbox.Errorf("native.Events", sandbox.Invalid, c.r.URL.Query().Get("since"), "since is the number of an event")
				}
				events, err := c.backend.Events(c.ctx, since)
				if err == nil {
					serveEvents(c.ctx, c.w, events)
				}
				return err
			}},
		on("GET", "/api/v1/pools", "The warm pools", func(c *call, _ none) ([]node.Pool, error) {
			return c.backend.Pools(c.ctx)
		}),
		on("PUT", "/api/v1/pools/{template}", "Set how many sandboxes a pool keeps ready", func(c *call, in PoolRequest) (none, error) {
			return none{}, c.backend.SetPool(c.ctx, c.r.PathValue("template"), in.Size)
		}),
		on("POST", "/api/v1/prune", "Remove what nothing needs", func(c *call, _ none) (node.PruneReport, error) {
			return c.backend.Prune(c.ctx)
		}),
		on("POST", "/api/v1/keys", "Create a key; its secret is in this answer only", func(c *call, in KeyRequest) (NewKey, error) {
			return c.backend.CreateKey(c.ctx, in.Team, in.Name)
		}),
		on("GET", "/api/v1/keys", "List keys, without their secrets", func(c *call, _ none) ([]tenant.Key, error) {
			return c.backend.Keys(c.ctx)
		}),
		on("DELETE", "/api/v1/keys/{ref}", "Revoke a key", func(c *call, _ none) (none, error) {
			return none{}, c.backend.RevokeKey(c.ctx, c.ref())
		}),
	}
}

func (c *call) ref() string { return c.r.PathValue("ref") }

func sandboxRoutes() []route {
	return []route{
		on("POST", "/api/v1/sandboxes", "Create a sandbox", func(c *call, in node.CreateRequest) (node.Sandbox, error) {
			return c.backend.Create(c.ctx, in)
		}),
		onStream("POST", "/api/v1/run", "Create a sandbox and run its main command; it goes with a client that is attached, if it is to be removed",
			func(c *call, in node.RunRequest, report func(node.RunEvent)) (node.Sandbox, error) {
				return c.backend.Run(c.ctx, in, report)
			}),
		on("GET", "/api/v1/sandboxes", "List sandboxes, newest first", func(c *call, _ none) ([]node.Sandbox, error) {
			f, err := filterOf(c.r.URL.Query())
			if err != nil {
				return nil, err
			}
			return c.backend.List(c.ctx, f)
		}, "team", "template", "state", "metadata", "all"),
		on("GET", "/api/v1/sandboxes/{ref}", "One sandbox, with its tokens", func(c *call, _ none) (node.Sandbox, error) {
			return c.backend.Get(c.ctx, c.ref())
		}),
		on("DELETE", "/api/v1/sandboxes/{ref}", "Remove a sandbox", func(c *call, _ none) (none, error) {
			return none{}, c.backend.Remove(c.ctx, c.ref())
		}),
		consoleRoute(),
		on("POST", "/api/v1/sandboxes/{ref}/pause", "Freeze a sandbox", func(c *call, in PauseRequest) (node.Sandbox, error) {
			return c.backend.Pause(c.ctx, c.ref(), in.Mode)
		}),
		on("POST", "/api/v1/sandboxes/{ref}/resume", "Let a paused sandbox go on", func(c *call, _ none) (node.Sandbox, error) {
			return c.backend.Resume(c.ctx, c.ref())
		}),
		on("POST", "/api/v1/sandboxes/{ref}/rename", "Rename a sandbox", func(c *call, in NameRequest) (none, error) {
			return none{}, c.backend.Rename(c.ctx, c.ref(), in.Name)
		}),
		on("POST", "/api/v1/sandboxes/{ref}/timeout", "Move the end of a sandbox", func(c *call, in TimeoutRequest) (none, error) {
			return none{}, c.backend.SetTimeout(c.ctx, c.ref(), in.Timeout)
		}),
		on("PUT", "/api/v1/sandboxes/{ref}/network", "Replace the network policy", func(c *call, in sandbox.NetworkPolicy) (none, error) {
			return none{}, c.backend.UpdateNetwork(c.ctx, c.ref(), in)
		}),
		on("POST", "/api/v1/sandboxes/{ref}/fork", "Make children that go on from here", func(c *call, in ForkRequest) ([]Fork, error) {
			results, err := c.backend.Fork(c.ctx, c.ref(), in.Count, in.Request)
			forks := make([]Fork, len(results))
			for i, r := range results {
				forks[i].Sandbox = r.Sandbox
				if r.Err != nil {
					p := ProblemOf(r.Err)
					forks[i].Problem = &p
				}
			}
			return forks, err
		}),
		on("GET", "/api/v1/sandboxes/{ref}/stats", "What a sandbox uses now", func(c *call, _ none) (sandbox.Stats, error) {
			return c.backend.Stats(c.ctx, c.ref())
		}),
		on("GET", "/api/v1/sandboxes/{ref}/wait", "Answer when the sandbox is in one of the states; with none, when its main command or it has ended", func(c *call, _ none) (node.Sandbox, error) {
			var states []sandbox.State
			for _, s := range c.r.URL.Query()["state"] {
				states = append(states, sandbox.State(s))
			}
			return c.backend.Wait(c.ctx, c.ref(), states...)
		}, "state"),
		{method: "GET", path: "/api/v1/sandboxes/{ref}/dial/{port}", summary: "Upgrade to the bytes of a TCP connection to a port inside", serve: serveDial},
		{method: "GET", path: "/api/v1/sandboxes/{ref}/changes", summary: "What changed in the root, as an OCI layer", returns: "application/x-tar",
			serve: func(c *call) error {
				return c.stream("application/x-tar", func(w http.ResponseWriter) error { return c.backend.Changes(c.ctx, c.ref(), w) })
			}},
		on("POST", "/api/v1/sandboxes/{ref}/ports", "Make a port reachable on the host", func(c *call, in node.Port) (node.Port, error) {
			return c.backend.Expose(c.ctx, c.ref(), in)
		}),
		on("DELETE", "/api/v1/sandboxes/{ref}/ports/{port}", "Close an exposed port", func(c *call, _ none) (none, error) {
			port, err := strconv.Atoi(c.r.PathValue("port"))
			if err != nil {
				return none{}, sandbox.Errorf("native.Unexpose", sandbox.Invalid, c.r.PathValue("port"), "not a port")
			}
			return none{}, c.backend.Unexpose(c.ctx, c.ref(), port)
		}),
	}
}

func snapshotRoutes() []route {
	return []route{
		on("POST", "/api/v1/sandboxes/{ref}/snapshots", "Save a sandbox's state", func(c *call, in NameRequest) (node.Snapshot, error) {
			return c.backend.Snapshot(c.ctx, c.ref(), in.Name)
		}),
		on("GET", "/api/v1/snapshots", "List snapshots", func(c *call, _ none) ([]node.Snapshot, error) {
			return c.backend.Snapshots(c.ctx, c.r.URL.Query().Get("sandbox"))
		}, "sandbox"),
		on("GET", "/api/v1/snapshots/{ref}", "One snapshot", func(c *call, _ none) (node.Snapshot, error) {
			return c.backend.GetSnapshot(c.ctx, c.ref())
		}),
		on("POST", "/api/v1/snapshots/{ref}/restore", "Make a sandbox from a snapshot", func(c *call, in node.CreateRequest) (node.Sandbox, error) {
			return c.backend.Restore(c.ctx, c.ref(), in)
		}),
		on("DELETE", "/api/v1/snapshots/{ref}", "Remove a snapshot", func(c *call, _ none) (none, error) {
			return none{}, c.backend.RemoveSnapshot(c.ctx, c.ref())
		}),
	}
}
