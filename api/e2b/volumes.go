package e2b

import (
	"net/http"

	"github.com/atoll-run/atoll/node"
	"github.com/atoll-run/atoll/tenant"
)

type volume struct {
	VolumeID string `json:"volumeID"`
	Name     string `json:"name"`
}

// volumeAndToken also says how to prove the right to a volume's content.
type volumeAndToken struct {
	volume
	Token string `json:"token"`
}

func withToken(v node.Volume) volumeAndToken {
	return volumeAndToken{volume: volume{VolumeID: v.ID, Name: v.Name}, Token: v.Token}
}

func (a *api) listVolumes(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	out := []volume{}
	for _, v := range a.node.Volumes(r.Context(), key.Team) {
		out = append(out, volume{VolumeID: v.ID, Name: v.Name})
	}
	writeJSON(w, http.StatusOK, out)
}

func (a *api) createVolume(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	body := struct {
		Name string `json:"name"`
	}{}
	if !a.decode(w, r, &body) {
		return
	}
	v, err := a.node.CreateVolume(r.Context(), key.Team, body.Name)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusCreated, withToken(v))
}

func (a *api) getVolume(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	v, err := a.node.GetVolume(r.Context(), key.Team, r.PathValue("id"))
	if err != nil {
		a.fail(w, r, err)
		return
	}
	writeJSON(w, http.StatusOK, withToken(v))
}

func (a *api) deleteVolume(w http.ResponseWriter, r *http.Request, key tenant.Key) {
	if err := a.node.RemoveVolume(r.Context(), key.Team, r.PathValue("id")); err != nil {
		a.fail(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}
